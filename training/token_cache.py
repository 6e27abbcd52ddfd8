"""Encodes pictures once: `unitok-hf encode --checkpoint out/tokenizer --data_path data/a.parquet --output_dir data/codes`.

    output_dir/codes-00000-of-00012.parquet, …
        image_codes   list<int32>, h·w codes row by row; null where a row has no picture. Of rows with lists of images
                      (column `images`): a list of such lists
        …             every column of the data but the picture
        schema metadata "unitok": the tokenizer's fingerprint, the grid, and which rows of which data

The training of the GPT takes such a folder as its `--data_path` and then encodes nothing. Codes mean nothing without the
tokenizer that made them: a cache made by other weights is refused. A shard is written beside and renamed; a run that was
stopped goes on with the shards that are missing. Several processes (`torchrun`) share the shards between them. Of the data,
one row group and one shard's other columns are in memory at a time.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..modeling_unitok.modeling_vq import UniTokVQModel
from .collators import has_many, image_column, parquet_files, require_side, require_size, to_pixels
from .parquet_rows import ParquetRows
from .runs import folder_beside


METADATA_KEY = b"unitok"


@dataclass
class EncodeArguments:
    """Arguments of `encode`."""

    checkpoint: str = field(metadata={"help": "Folder of the image tokenizer."})
    data_path: str = field(metadata={"help": "Parquet file, folder of Parquet files, or pattern, from prepare-data."})
    output_dir: str = field(metadata={"help": "Folder for the shards."})
    batch_size: int = field(default=64, metadata={"help": "Pictures that are encoded at once."})
    rows_per_shard: int = field(default=8192, metadata={"help": "Rows of one Parquet file."})

    def __post_init__(self):
        for name in ("batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def fingerprint(vq_model: UniTokVQModel) -> str:
    """SHA-256 of the weights that decide about codes: encoder, quant_conv and codebook. The decoder may be improved."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vq_model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.", "quantize.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_files(files: list[Path]) -> str:
    """SHA-256 of the sizes and footers of Parquet files; a footer has the place, size and range of every column's pages."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 2**16))
            digest.update(f"{size} ".encode() + file.read())
    return digest.hexdigest()


def read_metadata(path: Path) -> dict | None:
    """What a shard says about itself; None when it is no readable shard."""
    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    return json.loads(found[METADATA_KEY]) if METADATA_KEY in found else None


def require_fresh(files: list[Path], vq_model: UniTokVQModel) -> None:
    """Raises ValueError unless every file holds codes of this tokenizer."""
    wanted = fingerprint(vq_model)
    for path in files:
        found = read_metadata(path)
        if found is None or found["tokenizer"] != wanted:
            raise ValueError(f"{path} holds codes of another image tokenizer; encode the data again")


@torch.no_grad()
def encode(args: EncodeArguments) -> list[Path]:
    """Write the shards that are missing; returns all of them.

    Raises:
        OSError, ValueError: the tokenizer or the data cannot be used, or the folder holds shards of something else.
    """
    state = PartialState()
    vq_model = UniTokVQModel.from_pretrained(args.checkpoint).to(state.device).eval()
    rows = ParquetRows(parquet_files(args.data_path), memory=0)
    require_size(rows, vq_model.config.sample_size)
    size = vq_model.config.sample_size
    total = math.ceil(len(rows) / args.rows_per_shard)
    features = datasets.Features({name: kind for name, kind in rows.features.items() if name != image_column(rows)})
    features["image_codes"] = datasets.List(datasets.Value("int32"))
    if has_many(rows):
        features["image_codes"] = datasets.List(features["image_codes"])
    about = {
        "tokenizer": fingerprint(vq_model),
        "grid": list(vq_model.grid(size, size)),
        "data": f"{len(rows)} rows, {fingerprint_of_files(parquet_files(args.data_path))}",
    }
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"codes-{number:05d}-of-{total:05d}.parquet" for number in range(total)]
    strange = sorted(set(folder.glob("*.parquet")) - set(paths))
    if strange:
        raise ValueError(
            f"{folder} holds {strange[0].name}, which this run would not write; choose another --output_dir"
        )
    mine = list(enumerate(paths))[state.process_index :: state.num_processes]
    pictures = rows.select_columns(image_column(rows))  # once: what a shard leaves of a row group is for the next one
    others = rows.select_columns([name for name in rows.column_names if name != image_column(rows)])
    with folder_beside(folder) as beside:
        for number, path in tqdm(mine, desc="encoding", unit="shard", disable=not state.is_local_main_process):
            begin = number * args.rows_per_shard
            about["rows"] = [begin, min(begin + args.rows_per_shard, len(rows))]
            if path.exists():
                if read_metadata(path) != about:
                    raise ValueError(
                        f"{path} was made by another tokenizer or of other data; choose another --output_dir"
                    )
                continue
            write_shard(pictures, others, vq_model, features, about, args.batch_size, beside / path.name)
            os.replace(beside / path.name, path)
    state.wait_for_everyone()
    return paths


def write_shard(
    rows: ParquetRows,
    others: ParquetRows,
    vq_model: UniTokVQModel,
    features: datasets.Features,
    about: dict,
    batch_size: int,
    path: Path,
) -> None:
    """One Parquet file: the codes of the pictures in the rows `about["rows"]`, and the other columns of these rows."""
    codes: list[list | None] = []
    many, images = has_many(rows), image_column(rows)
    begin, end = about["rows"]
    for start in range(begin, end, batch_size):
        batch = rows[list(range(start, min(start + batch_size, end)))][images]
        own = [(row or []) if many else [row] if row is not None else [] for row in batch]
        for number, row in enumerate(own, start):
            for picture in row:
                require_side(picture.size, vq_model.config.sample_size, f"row {number} of the data:")
        pictures = [to_pixels(picture) for row in own for picture in row]
        found = iter([])
        if pictures:
            pixels = torch.stack(pictures).to(vq_model.device)
            found = iter(vq_model.encode_to_indices(pixels).flatten(1).tolist())
        rows_of_codes = [[next(found) for _ in row] for row in own]
        codes += rows_of_codes if many else [row[0] if row else None for row in rows_of_codes]
    schema = features.arrow_schema
    column = pa.array(codes, schema.field("image_codes").type)
    schema = schema.with_metadata({**schema.metadata, METADATA_KEY: json.dumps(about).encode()})
    columns = {"image_codes": column}
    if others.column_names:
        table = others.table(begin, end)
        columns = dict(zip(table.column_names, table.columns, strict=True)) | columns
    pq.write_table(pa.table(columns).cast(schema), path)
