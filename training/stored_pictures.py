"""Pictures of Parquet rows are read from the bytes in their row, and from nowhere else.

A row of an `Image` column may hold bytes, or only the name of a file or an address on the network, which the datasets library
would open: a table from a stranger could have any picture of this machine read, trained on, or uploaded with the rest.

    require_bytes    no row names a file instead of holding one
    guarded          features that decode as `processing.pixels` does: EPS is not run, bombs are not decoded, errors say which
"""

import reprlib
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from ..processing.pixels import PictureError, load_rgb


MOST_PIXELS = 2**24  # of one picture that is trained on


class StoredPicture(datasets.Image):
    """As `datasets.Image`, but decoded by `load_rgb`, from bytes alone."""

    def decode_example(self, value: dict, token_per_repo_id: dict | None = None) -> Image.Image:
        """An RGB picture; raises ValueError, with the name that the row gives it, when there is none in the bytes."""
        name = "a picture" if value["path"] is None else f"the picture {reprlib.repr(value['path'])}"
        if value["bytes"] is None:
            raise ValueError(
                f"{name} of the data is not in its row; write the data anew with `unitok-hf prepare-data`"
            )
        try:
            return load_rgb(value["bytes"], MOST_PIXELS)
        except PictureError as error:
            raise ValueError(
                f"{name} of the data cannot be read, {error}; leave it out with `prepare-data`"
            ) from error


def guarded(feature):
    """A feature, or features, with every `Image` inside as a `StoredPicture`."""
    if isinstance(feature, datasets.Image):
        return StoredPicture(mode=None, decode=feature.decode)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(guarded(feature.feature))
    return {name: guarded(part) for name, part in feature.items()} if isinstance(feature, dict) else feature


def require_bytes(rows: datasets.Dataset) -> None:
    """Raises ValueError, with the column and the row where it can be told, if a row names a file instead of holding it."""
    for column in rows.column_names:
        begin = 0
        for chunk in rows.data.column(column).chunks:
            for where in outside(chunk):
                row = "" if where is None else f", row {begin + where}"
                raise ValueError(
                    f"the column {column!r}{row} names a file instead of holding its bytes; it is not opened. "
                    "Write the data anew with `unitok-hf prepare-data`"
                )
            begin += len(chunk)


def outside(array: pa.Array, row: bool = True) -> Iterator[int | None]:
    """The first place in an array, None where it is inside of lists, at which a file is named and not held."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        names = {array.type.field(number).name for number in range(array.type.num_fields)}
        if names == {"bytes", "path"}:
            held, named = (pc.is_valid(pc.struct_field(array, name)) for name in ("bytes", "path"))
            found = pc.index(pc.and_not(named, held), True).as_py()
            if found >= 0:
                yield found if row else None
        else:
            for number in range(array.type.num_fields):
                yield from outside(pc.struct_field(array, [number]), row)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        yield from outside(array.flatten(), False)


def belongs_to(path: str, dataset: str) -> bool:
    """Whether a file that a row names is one of the data set's own: in its folder, its repository, or the cache of that."""
    place = path.rpartition("::")[2]  # of zip://a.png::place
    if place.startswith("hf://"):
        own = place.removeprefix(f"hf://datasets/{dataset}")
        return own != place and own[:1] in ("@", "/") and ".." not in own.split("/")
    if "://" in place:
        return False
    roots = [Path(datasets.config.HF_DATASETS_CACHE)]
    if Path(dataset).exists():
        roots = roots + [Path(dataset)] if Path(dataset).is_dir() else []
    else:
        roots.append(Path(HF_HUB_CACHE) / f"datasets--{dataset.replace('/', '--')}")
    try:
        return any(Path(place).resolve().is_relative_to(root.resolve()) for root in roots)
    except (OSError, ValueError):  # no name that a file can have
        return False
