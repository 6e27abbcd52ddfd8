"""Turns pictures and captions into Parquet.

    unitok-hf prepare-data --folder photos --output_file data/photos.parquet --image_size 64

- image: PNG bytes, RGB, image_size x image_size (how a picture gets there: `processing.pixels`); its `path` is the
  name that the picture has in its source
- text: the caption, or null; surrounding blanks are cut, blanks and line breaks inside become one blank
- label: the class, if the source has classes

The features are in the schema metadata, so that `datasets.load_dataset("parquet", data_files=...)` and the viewer of
the Hub show pictures without being told.

From the source to the file, nothing is lost in silence: a picture becomes a row, or it is named with the reason in
`<stem>.left_out.jsonl` beside the Parquet file, and the summary counts the reasons:

    not an image         another kind of file, or one that is empty or cut off before it says what it is
    truncated            the end is missing
    unreadable           damaged, or its kind of pixels cannot be read
    too large            more than --max_pixels
    too small            the shorter side is below --min_size
    duplicate            the same pixels as an earlier picture, before resizing (--drop_duplicates)
    listed but missing   the metadata file or the data set names it, and it is not there
    link                 a link; none is followed: it leads out of the folder or data set, or to what is read anyway
    hidden               a picture whose name, or the name of a folder it is in, begins with a dot

Files appear when all is done: they are written to a hidden folder beside --output_file and then moved. An error or
Ctrl-C removes that folder; after a kill, the next run that writes there does. A kill while several files are being moved
leaves `.<stem>.finished` with the rest of them: the next run for this --output_file moves them first.

Memory: a few pictures per worker and one row group, whatever the number of pictures; besides, the captions of metadata
files, what was left out, and with --drop_duplicates a hash and a name per picture.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import string
import tarfile
import unicodedata
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from datasets.features.features import FeatureType
from PIL import Image
from pyarrow.fs import LocalFileSystem
from tqdm import tqdm

from ..configuration.refusal_unitok import refused_in_words
from ..processing.pixels import PictureError, fit_square, load_rgb
from .runs import folder_beside
from .stored_pictures import belongs_to


SINGLE_FILES = {".parquet": "parquet", ".tar": "webdataset"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2  # a label, then the red, the green and the blue plane
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS_HELD_OUT = 397

# Small enough to show one page of a viewer quickly and to bound memory, large enough to read through fast.
ROWS_PER_GROUP = 256
BYTES_PER_GROUP = 32 * 2**20

REPORT = "report.json"

WORKERS = min(8, os.cpu_count() or 1)


@dataclass(kw_only=True)
class PrepareDataArguments:
    """Arguments of `prepare-data`. One source is given: folder, download_cifar, cifar_archive, dataset or builtin.

    Output: `--output_file data/a.parquet` writes data/a.parquet. If --max_rows_per_shard makes more than one file
    necessary, they are data/a-00000-of-00003.parquet and so on, and there is no data/a.parquet. What was left out is
    in data/a.left_out.jsonl, one JSON object per line with item, reason and detail; no such file: nothing was. If any
    of these exists already, the command refuses to start.

    Captions of a folder: from metadata.csv or metadata.jsonl (column `file_name`, relative to the folder of the
    metadata file, and --text_column), in the folder or in folders inside. A picture that is listed twice makes two
    rows; one that is not listed makes a row without caption. If there is no metadata file, and pictures are in two or
    more folders directly inside, these are the classes. Rows are sorted by name, folder by folder.
    """

    output_file: str | None = field(default=None, metadata={"help": "The Parquet file to write, name.parquet."})
    folder: str | None = field(default=None, metadata={"help": "Source: a folder of pictures, with folders inside."})
    download_cifar: bool = field(default=False, metadata={"help": "Source: CIFAR-10 from the Hub."})
    cifar_archive: str | None = field(
        default=None, metadata={"help": "Source: CIFAR-10 from a copy of cifar-10-binary.tar.gz, without network."}
    )
    dataset: str | None = field(
        default=None,
        metadata={"help": "Source: a data set of the Hub, or of a local folder, .parquet file or WebDataset .tar."},
    )
    builtin: Literal["digits"] | None = field(
        default=None, metadata={"help": "Source: the 1,797 handwritten digits that come with scikit-learn."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset, if it has several."}
    )
    split: str = field(
        default="train",
        metadata={"help": "The part to take, for example train or test; not for --folder. Digits: 1,400 and 397."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read --dataset without storing it on disk first."})
    image_column: str = field(default="image", metadata={"help": "Pictures of --dataset."})
    text_column: str | None = field(
        default=None, metadata={"help": "Captions of --dataset or of a metadata file; the column text unless given."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Classes of --dataset."})
    caption_template: str = field(
        default="a photo of a {label}", metadata={"help": "Caption of a picture that has a class but no caption."}
    )
    image_size: int = field(default=64, metadata={"help": "Width and height of the pictures written."})
    max_rows_per_shard: int | None = field(
        default=None, metadata={"help": "Split the output into files of this size."}
    )
    min_size: int | None = field(
        default=None, metadata={"help": "Leave out pictures whose shorter side is smaller; else they are enlarged."}
    )
    max_pixels: int = field(
        default=64_000_000,
        metadata={
            "help": "Leave out pictures of more pixels; the default admits cameras of 61 MP, and such a picture takes "
            "half a gigabyte while it is read. Above 178,956,970 Pillow refuses anyway."
        },
    )
    drop_duplicates: bool = field(default=False, metadata={"help": "Keep the first of pictures with equal pixels."})
    strict: bool = field(
        default=False, metadata={"help": "Stop at the first thing that would be left out, and write nothing."}
    )


@dataclass(frozen=True)
class LeftOut:
    """Something in the source that is not in the output. The reasons are those of the module's docstring."""

    item: str
    reason: str
    detail: str


@dataclass
class DataReport:
    """What `prepare_data` did.

    Args:
        files: the Parquet files.
        rows, captioned: rows written, and how many of them have a caption.
        enlarged: pictures whose shorter side was below the image size.
        class_names: the classes; None without a label column.
        left_out: in the order in which they were met.
    """

    files: list[Path] = field(default_factory=list)
    rows: int = 0
    captioned: int = 0
    enlarged: int = 0
    class_names: list[str] | None = None
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def reasons(self) -> Counter:
        """How many were left out for each reason."""
        return Counter(left.reason for left in self.left_out)

    def summary(self) -> str:
        first, last = self.files[0], self.files[-1]
        name = str(first) if first == last else f"{first} … {last.name} ({len(self.files)} files)"
        size = sum(file.stat().st_size for file in self.files)
        lines = [f"{name}: {self.rows:,} rows, {self.captioned:,} with a caption, {size / 1e6:.2f} MB"]
        if self.class_names is not None:
            lines.append(f"{len(self.class_names)} classes: {shortened(self.class_names)}")
        if self.enlarged:
            lines.append(f"{self.enlarged:,} pictures were smaller than --image_size and have been enlarged")
        lines.append(f"left out: {len(self.left_out):,}")
        lines += [f"{count:8,}  {reason}" for reason, count in self.reasons.most_common()]
        return "\n".join(lines)

    def to_json(self) -> dict:
        return asdict(self) | {"files": [str(file) for file in self.files]}

    @classmethod
    def from_json(cls, found: dict) -> "DataReport":
        files, left_out = map(Path, found["files"]), (LeftOut(**left) for left in found["left_out"])
        return cls(**found | {"files": list(files), "left_out": list(left_out)})


@dataclass(frozen=True)
class Item:
    """A picture of a source.

    Args:
        name: unique in the source.
        picture: what `load_rgb` takes, or a remote file to be opened.
        captions: one row is made for each.
        class_name: None if there is no class.
        hidden: whether the picture is to be left out, if it is one.
    """

    name: str
    picture: Path | bytes | Image.Image | fsspec.core.OpenFile
    captions: tuple[str | None, ...] = (None,)
    class_name: str | None = None
    hidden: bool = False


class Listing(NamedTuple):
    """A row of a metadata file, and where it is."""

    caption: str | None
    file: str
    line: int


@dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Args:
        items: the pictures, and what is known not to be one.
        total: how many `items` there are; None if that is not known.
        class_names: what the label column counts; None for no label column.
    """

    items: Iterable[Item | LeftOut]
    total: int | None = None
    class_names: list[str] | None = None


def prepare_data(args: PrepareDataArguments) -> DataReport:
    """Writes the Parquet files and the list of what was left out, and prints the summary.

    Raises:
        ValueError: contradictory arguments, a malformed metadata file or archive, no usable picture at all, or
            something left out with `strict`. Nothing is written.
        FileExistsError: the output is there already.
        OSError: a source or the disk fails. Nothing is written.
    """
    open_source = chosen_source(args)
    output = Path(args.output_file)
    made, report = publish(output)
    if made != asdict(args):
        refuse_to_overwrite(output)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # about single files, whose fate is in the report
            report = write_rows(open_source(args), args, output)
    print(report.summary())
    return report


def write_rows(source: Source, args: PrepareDataArguments, output: Path) -> DataReport:
    report = DataReport(class_names=source.class_names)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        folder_beside(output.parent) as scratch,
        tqdm(total=source.total, unit=" pictures", desc="prepare-data") as progress,
        Shards(scratch, source.class_names, args.max_rows_per_shard) as shards,
        closing(in_order(partial(render, args=args), source.items)) as results,
    ):
        names_of_pixels = {}
        for result in results:
            progress.update()
            if not isinstance(result, LeftOut) and args.drop_duplicates:
                first = names_of_pixels.setdefault(result.digest, result.item.name)
                if first != result.item.name:
                    result = LeftOut(result.item.name, "duplicate", f"the same pixels as {first}")
            if isinstance(result, LeftOut):
                if args.strict:
                    raise ValueError(
                        f"{result.item}: {result.reason} ({result.detail}); --strict lets nothing be left out"
                    )
                report.left_out.append(result)
                continue
            report.enlarged += result.enlarged
            for caption in result.item.captions:
                caption = " ".join((caption or "").split()) or None
                if caption is None and result.item.class_name is not None:
                    caption = args.caption_template.format(label=spoken(result.item.class_name))
                shards.write(result, caption)
                report.rows += 1
                report.captioned += caption is not None
        if report.rows == 0:
            found = ", ".join(f"{count:,} {reason}" for reason, count in report.reasons.most_common())
            raise ValueError(f"no picture can be used, nothing is written (left out: {found or 'nothing was there'})")
        report.files = name_files(shards.finish(), report.left_out, output)
        (scratch / REPORT).write_text(json.dumps([asdict(args), report.to_json()]), encoding="utf-8")
        refuse_to_overwrite(output)
        scratch.rename(finished_folder(output))
    publish(output)
    return report


def chosen_source(args: PrepareDataArguments) -> Callable[[PrepareDataArguments], Source]:
    """The function that opens the one source given, after every argument has been checked."""
    given = {f.name: vars(args)[f.name] for f in fields(args) if vars(args)[f.name] != f.default}
    chosen = [name for name in SOURCES if name in given]
    if len(chosen) != 1:
        found = f"not {len(chosen)} ({' '.join(f'--{name}' for name in chosen)})" if chosen else "there is none"
        raise ValueError(f"one source must be given, {found}; sources are --{', --'.join(SOURCES)}")
    if not given[chosen[0]]:
        raise ValueError(f"--{chosen[0]} is empty")
    for name, sources in ONLY_FOR.items():
        if name in given and chosen[0] not in sources:
            raise ValueError(f"--{name} has no meaning for --{chosen[0]}, only for --{' and --'.join(sources)}")
    if args.output_file is None or not args.output_file.endswith(".parquet"):
        raise ValueError(f"--output_file must name a .parquet file, not {args.output_file}")
    for name in ("image_size", "max_rows_per_shard", "min_size", "max_pixels"):
        if vars(args)[name] is not None and vars(args)[name] < 1:
            raise ValueError(f"--{name} must be at least 1, not {vars(args)[name]}")
    try:
        parts = [
            (name, form, conversion) for _, name, form, conversion in string.Formatter().parse(args.caption_template)
        ]
    except ValueError as error:
        raise ValueError(f"--caption_template {args.caption_template!r}: {error}") from error
    if {part for part in parts if part[0] is not None} != {("label", "", None)}:
        raise ValueError(
            f"--caption_template must contain {{label}} and no other field, not {args.caption_template!r}"
        )
    return SOURCES[chosen[0]]


def folder_source(args: PrepareDataArguments) -> Source:
    """A folder as people have them. The folder is walked anew for each question, rather than kept in memory."""
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--folder {folder} is not a folder")
    if Path(args.output_file).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--output_file {args.output_file} is inside --folder {folder}; write it elsewhere")
    files = [found for found in walk(folder) if isinstance(found, str) and is_metadata(found)]
    if not files:
        class_names = find_classes(folder, args.max_pixels)
        return Source(folder_items(folder, {}, class_names), sum(1 for _ in walk(folder)), class_names or None)
    for file in files:
        twin = file.removesuffix("jsonl") + "csv"
        if file.endswith("jsonl") and twin in files:
            raise ValueError(f"{folder / twin} and {folder / file} both list captions; keep one of them")
    listings: dict[str, list[Listing]] = {}
    for file in files:
        for line, name, caption in read_metadata(folder / file, args.text_column or "text"):
            name = posixpath.normpath(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
            listings.setdefault(unicodedata.normalize("NFC", name), []).append(Listing(caption, file, line))
    total = 0
    missing = dict(listings)
    for found in walk(folder):
        total += not (isinstance(found, str) and is_metadata(found))
        missing.pop(composed(found if isinstance(found, str) else found.item), None)
    lines = [
        LeftOut(printable(name), "listed but missing", f"{listing.file}, line {listing.line}")
        for name, rows in missing.items()
        for listing in rows
    ]
    return Source(chain(lines, folder_items(folder, listings, [])), total + len(lines))


def read_metadata(path: Path, text_column: str) -> Iterator[tuple[int, str, str | None]]:
    """Line number, file name and caption of each row.

    Raises:
        ValueError: the file is not UTF-8 (with or without byte order mark), not CSV or JSON lines, or lacks a column.
    """
    rows, line = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                columns, line = reader.fieldnames or [], reader.line_num
                for row in reader:
                    line = reader.line_num
                    rows.append((line, row))
            else:
                columns = {}
                for line, text in enumerate(file, start=1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise ValueError(f"{path}, line {line} is not a JSON object")
                        rows.append((line, row))
                        columns |= row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}, after line {line}: nested too deeply") from error
    except (csv.Error, ValueError) as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}, after line {line}: {error}") from error
    for column in ("file_name", text_column):
        if column not in columns:
            raise ValueError(
                f"{path} has no column {column}, only {', '.join(columns)}; --text_column names that of the captions"
            )
    for line, row in rows:
        if None in row:
            raise ValueError(f"{path}, line {line} has more fields than the header; captions with commas need quotes")
        name, caption = row.get("file_name"), row.get(text_column)
        if not isinstance(name, str) or not isinstance(caption, str | None):
            raise ValueError(
                f"{path}, line {line}: file_name and {text_column} must be text, not {name!r}, {caption!r}"
            )
        if caption is not None and caption != caption.encode(errors="replace").decode():
            raise ValueError(f"{path}, line {line}: {text_column} has half a surrogate pair, which cannot be written")
        yield line, name, caption


def walk(folder: Path, inside: str = "") -> Iterator[str | LeftOut]:
    """The names of all files below `folder`, relative to it, and a line for all else; sorted, links not followed."""
    try:
        with os.scandir(folder / inside) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except PermissionError as error:
        yield LeftOut(printable(inside), "unreadable", f"this folder cannot be listed: {error.strerror}")
        return
    for entry in ordered:
        name = inside + entry.name
        if entry.is_symlink():
            yield LeftOut(printable(name), "link", f"to {printable(os.readlink(entry.path))}")
        elif entry.is_dir():
            yield from walk(folder, f"{name}/")
        elif entry.is_file():
            yield name
        else:
            yield LeftOut(printable(name), "not an image", "neither a file nor a folder")


def find_classes(folder: Path, max_pixels: int) -> list[str]:
    """The folders directly inside which hold pictures, if there are at least two."""
    classes = set()
    for found in walk(folder):
        if isinstance(found, str) and "/" in found and not is_hidden(found) and class_of(found) not in classes:
            try:
                load_rgb(folder / found, max_pixels)
            except (PictureError, OSError):
                continue
            classes.add(class_of(found))
    return sorted(classes) if len(classes) > 1 else []


def folder_items(folder: Path, listings: dict[str, list[Listing]], class_names: list[str]) -> Iterator[Item | LeftOut]:
    for found in walk(folder):
        if isinstance(found, LeftOut):
            yield found
        elif not is_metadata(found):
            rows = listings.get(composed(found))
            class_name = class_of(found) if "/" in found else None
            yield Item(
                name=printable(found),
                picture=folder / found,
                captions=tuple(row.caption for row in rows) if rows else (None,),
                class_name=class_name if class_name in class_names else None,
                hidden=is_hidden(found),
            )


def is_metadata(name: str) -> bool:
    return posixpath.basename(name) in METADATA_FILES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def class_of(name: str) -> str:
    return composed(name.split("/")[0])


def composed(name: str) -> str:
    """The spelling of a name that is the same whether its accents came as letters or as marks (NFC)."""
    return unicodedata.normalize("NFC", printable(name))


def printable(name: str) -> str:
    """A file name as text that can be written anywhere: bytes in it that are not UTF-8 become a replacement mark."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:  # half a surrogate pair, which no file name has
        return name.encode("utf-8", "replace").decode()


def spoken(class_name: str) -> str:
    """How a caption says a class: red-fox and red_fox are a red fox."""
    return " ".join(re.sub("[-_]", " ", class_name).split())


def dataset_source(args: PrepareDataArguments) -> Source:
    path, files = args.dataset, None
    if Path(args.dataset).is_file():
        path, files = SINGLE_FILES.get(Path(args.dataset).suffix), args.dataset
        if path is None:
            raise ValueError(
                f"--dataset {args.dataset}: of single files, only {' and '.join(SINGLE_FILES)} can be read"
            )
    try:
        rows = load_dataset(path, args.dataset_config, data_files=files, split=args.split, streaming=args.streaming)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and not Path(args.dataset).exists():
            raise
        raise ValueError(f"--dataset {args.dataset}: {error.__cause__ or error}") from error
    return rows_source(rows, args.image_column, args.text_column, args.label_column, args.split, args.dataset)


def cifar_download_source(args: PrepareDataArguments) -> Source:
    try:
        rows = load_dataset("uoft-cs/cifar10", split=args.split)
    except (OSError, DatasetsError) as error:
        raise OSError(
            f"CIFAR-10 could not be fetched from the Hub ({error}). For a machine without network, bring "
            "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and give it as --cifar_archive"
        ) from error
    return rows_source(rows, "img", None, "label", args.split, "uoft-cs/cifar10")


def rows_source(
    rows: Dataset | IterableDataset,
    image_column: str,
    text_column: str | None,
    label_column: str | None,
    split: str,
    dataset: str,
) -> Source:
    """Rows of the datasets library, named split/number. A file that a row names is read if it is the data set's own.

    Raises:
        ValueError: a column is not there or holds something else.
    """
    features = rows.features
    if features is None:
        raise ValueError("streamed, this data set does not say what its columns hold; read it without --streaming")
    if text_column is None and "text" in features:
        text_column = "text"
    columns = {"image_column": image_column, "text_column": text_column, "label_column": label_column}
    columns = {flag: column for flag, column in columns.items() if column is not None}
    for flag, column in columns.items():
        if column not in features:
            raise ValueError(f"--{flag} {column}: there is no such column, only {', '.join(features)}")
        if not can_serve(flag, features[column]):
            raise ValueError(f"--{flag} {column}: this column holds {features[column]}, which cannot serve as that")
    label = features[label_column] if label_column else None
    class_names = label.names if isinstance(label, ClassLabel) else None
    rows = rows.select_columns(list(dict.fromkeys(columns.values())))
    rows = rows.cast_column(image_column, ImageFeature(decode=False))

    def items() -> Iterator[Item | LeftOut]:
        remaining = iter(rows)
        for index in count():
            name = f"{split}/{index}"
            with refused_in_words(f"--dataset {dataset}: row {name} cannot be read"):
                try:
                    row = next(remaining, None)
                except UnicodeDecodeError as error:
                    raise ValueError(f"--dataset {dataset}: row {name} holds text that is not UTF-8") from error
            if row is None:
                return
            value = row[image_column]
            if (
                value is not None
                and value["bytes"] is None
                and value["path"]
                and not belongs_to(value["path"], dataset)
            ):
                yield LeftOut(name, "link", f"{printable(value['path'])} is not in the data set")
                continue
            picture = picture_of(value)
            if picture is None:
                yield LeftOut(name, "listed but missing", "the row holds no picture")
                continue
            class_name = row[label_column] if label_column else None
            if class_names is not None and class_name is not None:
                if class_name >= len(class_names):
                    raise ValueError(f"--dataset {dataset}: row {name} is of class {class_name}, which has no name")
                class_name = class_names[class_name] if class_name >= 0 else None  # -1: not labelled
            yield Item(
                name=name,
                picture=picture,
                captions=(row[text_column] if text_column else None,),
                class_name=None if class_name is None else str(class_name),
            )

    return Source(items(), len(rows) if isinstance(rows, Dataset) else None, class_names)


def can_serve(flag: str, feature: FeatureType) -> bool:
    """Whether a column of this kind can be what the flag says it is."""
    texts = (Value("string"), Value("large_string"))
    if flag == "image_column":
        raw = (Value("binary"), Value("large_binary"), {"bytes": Value("binary"), "path": Value("string")})
        return isinstance(feature, ImageFeature) or feature in raw
    if flag == "label_column":
        return isinstance(feature, ClassLabel) or feature in (*texts, Value("int32"), Value("int64"))
    return feature in texts


def picture_of(value: dict | None) -> bytes | Path | fsspec.core.OpenFile | None:
    """The picture in a value of an undecoded image column."""
    if value is None or (value["bytes"] is None and value["path"] is None):
        return None
    if value["bytes"] is not None:
        return value["bytes"]
    return fsspec.open(value["path"], "rb") if "://" in value["path"] else Path(value["path"])


def cifar_archive_source(args: PrepareDataArguments) -> Source:
    """The binary version of CIFAR-10. Nothing is extracted, and the pickles of the Python version are never opened."""
    batches = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
    if args.split not in batches:
        raise ValueError(f"--split {args.split}: CIFAR-10 has train and test")
    path = Path(args.cifar_archive)
    with open_archive(path) as archive:
        members = {posixpath.basename(member.name): member for member in archive if member.isfile()}
        archive.fileobj.read()  # to the end, where the checksum is
        missing = [name for name in (*batches[args.split], "batches.meta.txt") if name not in members]
        if missing:
            raise ValueError(
                f"{path} is not cifar-10-binary.tar.gz: {missing[0]} is not in it, only {shortened(sorted(members))} "
                "(CIFAR-10 comes in several versions; the one called binary is needed)"
            )
        class_names = archive.extractfile(members["batches.meta.txt"]).read().decode().split()
    batches = {name: members[name] for name in batches[args.split]}
    for name, member in batches.items():
        if member.size % CIFAR_RECORD:
            raise ValueError(f"{path}: {name} has {member.size:,} bytes, which are no records of {CIFAR_RECORD}")

    def items() -> Iterator[Item]:
        with open_archive(path) as archive:
            for name, member in batches.items():
                batch = archive.extractfile(member)
                for index in range(member.size // CIFAR_RECORD):
                    record = np.frombuffer(batch.read(CIFAR_RECORD), np.uint8)
                    label, planes = int(record[0]), record[1:].reshape(3, CIFAR_SIDE, CIFAR_SIDE)
                    if label >= len(class_names):
                        raise ValueError(f"{path}: record {index} of {name} is of class {label}, which has no name")
                    yield Item(
                        name=f"{name.removesuffix('.bin')}/{index:05d}",
                        picture=Image.fromarray(planes.transpose(1, 2, 0)),
                        class_name=class_names[label],
                    )

    return Source(items(), sum(member.size // CIFAR_RECORD for member in batches.values()), class_names)


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a complete cifar-10-binary.tar.gz: {error}") from error


def digits_source(args: PrepareDataArguments) -> Source:
    """White on black, 8x8. The same 397 digits are always held out as `test`, equally many of each class."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("--builtin digits needs scikit-learn: pip install scikit-learn") from error

    digits = load_digits()
    parts = train_test_split(
        range(len(digits.target)), test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=0
    )
    parts = {"train": sorted(parts[0]), "test": sorted(parts[1])}
    if args.split not in parts:
        raise ValueError(f"--split {args.split}: the digits have train and test")
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    indices = parts[args.split]
    items = (
        Item(f"digits/{index:04d}", Image.fromarray(pixels[index]), class_name=DIGITS[digits.target[index]])
        for index in indices
    )
    return Source(items, len(indices), DIGITS)


SOURCES: dict[str, Callable[[PrepareDataArguments], Source]] = {
    "folder": folder_source,
    "download_cifar": cifar_download_source,
    "cifar_archive": cifar_archive_source,
    "dataset": dataset_source,
    "builtin": digits_source,
}

# The flags that only some sources understand.
ONLY_FOR = {
    "dataset_config": ["dataset"],
    "split": ["download_cifar", "cifar_archive", "dataset", "builtin"],
    "streaming": ["dataset"],
    "image_column": ["dataset"],
    "text_column": ["folder", "dataset"],
    "label_column": ["dataset"],
}


@dataclass(frozen=True)
class Rendered:
    """An item as it will be stored.

    Args:
        png: a file, image_size x image_size.
        digest: of the pixels before resizing; None unless duplicates are looked for.
        enlarged: whether the picture was smaller.
    """

    item: Item
    png: bytes
    digest: bytes | None
    enlarged: bool


def render(item: Item | LeftOut, args: PrepareDataArguments) -> Rendered | LeftOut:
    if isinstance(item, LeftOut):
        return item
    try:
        if isinstance(item.picture, fsspec.core.OpenFile):
            with item.picture as file:
                image = load_rgb(file.read(), args.max_pixels)
        else:
            image = load_rgb(item.picture, args.max_pixels)
    except PictureError as error:
        return LeftOut(item.name, error.reason, error.detail)
    except PermissionError as error:
        return LeftOut(item.name, "unreadable", error.strerror)
    except FileNotFoundError as error:
        return LeftOut(item.name, "listed but missing", str(error))
    if item.hidden:
        return LeftOut(item.name, "hidden", "a name in its path begins with a dot")
    if args.min_size is not None and min(image.size) < args.min_size:
        return LeftOut(item.name, "too small", f"{image.width}x{image.height}")
    digest = None
    if args.drop_duplicates:
        digest = hashlib.blake2b(
            image.tobytes(), digest_size=16, salt=f"{image.width}x{image.height}".encode()
        ).digest()
    file = io.BytesIO()
    fit_square(image, args.image_size).save(file, "PNG")
    return Rendered(item, file.getvalue(), digest, enlarged=min(image.size) < args.image_size)


def in_order(work: Callable, items: Iterable) -> Iterator:
    """`work` of each item, done by threads a few items ahead, in the order of the items.

    Threads suffice: Pillow decodes, resizes and encodes without the interpreter's lock.
    """
    ahead = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) == 4 * WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class Shards:
    """Writes rows into Parquet files inside a folder, one row group at a time.

    Args:
        folder: receives 0.parquet, 1.parquet, …
        class_names: names of the label column; None for no such column.
        max_rows: rows per file; None for a single file.
    """

    def __init__(self, folder: Path, class_names: list[str] | None, max_rows: int | None):
        features = {"image": ImageFeature(), "text": Value("string")}
        if class_names is not None:
            features["label"] = ClassLabel(names=class_names)
        self.schema = Features(features).arrow_schema
        self.folder = folder
        self.labels = None if class_names is None else {name: index for index, name in enumerate(class_names)}
        self.max_rows = max_rows
        self.files: list[Path] = []
        self.writer: pq.ParquetWriter | None = None
        self.rows_in_file = 0
        self.group: list[dict] = []
        self.bytes_in_group = 0

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error) -> None:
        if self.writer is not None:
            self.writer.close()

    def write(self, rendered: Rendered, caption: str | None) -> None:
        row = {"image": {"bytes": rendered.png, "path": rendered.item.name}, "text": caption}
        if self.labels is not None:
            row["label"] = self.labels.get(rendered.item.class_name)
        self.group.append(row)
        self.bytes_in_group += len(rendered.png)
        self.rows_in_file += 1
        if len(self.group) == ROWS_PER_GROUP or self.bytes_in_group >= BYTES_PER_GROUP:
            self.write_group()
        if self.rows_in_file == self.max_rows:
            self.close_file()

    def finish(self) -> list[Path]:
        """The files, complete."""
        self.close_file()
        return self.files

    def write_group(self) -> None:
        if self.writer is None:
            self.files.append(self.folder / f"{len(self.files)}.parquet")
            self.writer = pq.ParquetWriter(
                self.files[-1],
                self.schema,
                filesystem=LocalFileSystem(),
                use_dictionary=["text", "label"],
                write_statistics=["text", "label"],
                write_page_index=True,
                use_content_defined_chunking=True,  # the Hub then stores only what a new version changes
            )
        self.writer.write_table(pa.Table.from_pylist(self.group, schema=self.schema))
        self.group, self.bytes_in_group = [], 0

    def close_file(self) -> None:
        if self.group:
            self.write_group()
        if self.writer is not None:
            self.writer.close()
            self.writer, self.rows_in_file = None, 0


def left_out_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.left_out.jsonl")


def refuse_to_overwrite(output: Path) -> None:
    """Raises FileExistsError if a file is there that an earlier run for this output wrote, or that this one would."""
    ours = re.compile(re.escape(output.stem) + r"(-\d{5}-of-\d{5})?\.parquet|" + re.escape(left_out_file(output).name))
    if output.parent.is_dir():
        for file in sorted(output.parent.iterdir()):
            if ours.fullmatch(file.name):
                raise FileExistsError(f"{file} exists; move it away or choose another --output_file")


def finished_folder(output: Path) -> Path:
    return output.with_name(f".{output.stem}.finished")


def name_files(shards: list[Path], left_out: list[LeftOut], output: Path) -> list[Path]:
    """Gives complete files the names under which they will be published, which are returned."""
    if left_out:
        with open(shards[0].with_name(left_out_file(output).name), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(left), ensure_ascii=False) + "\n" for left in left_out)
    names = [f"{output.stem}-{number:05d}-of-{len(shards):05d}.parquet" for number in range(len(shards))]
    files = [output] if len(shards) == 1 else [output.with_name(name) for name in names]
    for shard, file in zip(shards, files, strict=True):
        shard.rename(shard.with_name(file.name))
    return files


def publish(output: Path) -> tuple[dict | None, DataReport | None]:
    """Moves the files that are finished to where they belong; the Parquet files come last.

    Returns:
        the arguments and the report of the run that made them; None twice if there are none.
    """
    folder = finished_folder(output)
    if not (folder / REPORT).is_file():
        with suppress(OSError):
            folder.rmdir()  # all but this was done
        return None, None
    made, report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    waiting = [file for file in folder.iterdir() if file.name != REPORT]
    for file in sorted(waiting, key=lambda file: (file.suffix == ".parquet", file.name)):
        if output.with_name(file.name).exists():
            raise FileExistsError(f"{output.with_name(file.name)} exists; move it away, {file} belongs there")
        file.rename(output.with_name(file.name))
    shutil.rmtree(folder)
    return made, DataReport.from_json(report)


def shortened(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
