"""The readers of data, given spoiled pictures, spoiled Parquet files and Parquet files of any schema."""

import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_corpus import GIF, GOOD_PARQUET, HELD, JPEG, PICTURE, PNG, TIFF, WEBP, noise, table
from hostile_profile import documented, hypothesis

from unitok_hf.processing.pixels import load_rgb
from unitok_hf.training.collators import (
    PictureCollator,
    PictureDataset,
    StreamCollator,
    StreamDataset,
    read_rows,
    require_images,
    require_pictures,
    require_text,
)
from unitok_hf.training.data import PrepareDataArguments, dataset_source, render
from unitok_hf.training.parquet_rows import ParquetRows


st = hypothesis.strategies

PICTURES = [PNG, JPEG, WEBP, GIF, TIFF, noise("BMP"), noise("PPM"), noise("TGA"), noise("JPEG2000"), noise("ICO")]


@st.composite
def spoiled(draw, originals):
    """Bytes turned, taken out, put in, cut off or written twice."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([64, 1_500, len(data)]))
        place = draw(st.integers(0, max(0, min(near, len(data)) - 1)))
        place = place if draw(st.booleans()) else max(0, len(data) - 1 - place)
        what = draw(st.sampled_from(["turn", "turn", "turn", "take", "put", "cut", "huge", "double"]))
        if what == "turn" and data:
            data[place] = draw(st.integers(0, 255))
        elif what == "take":
            del data[place : place + draw(st.integers(1, 16))]
        elif what == "put":
            data[place:place] = draw(st.binary(max_size=16))
        elif what == "cut":
            del data[place:]
        elif what == "huge":
            data[place : place + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80", bytes(4)])
            )
        elif what == "double":
            data += data[place : place + 256]
    return bytes(data)


@hypothesis.given(data=st.one_of(spoiled(PICTURES), st.binary(max_size=200)))
def test_any_bytes_are_a_picture_or_are_refused(data):
    with documented():
        image = load_rgb(data, 2**22)
        assert image.mode == "RGB" and 0 < image.width * image.height <= 2**22


def read_all(file, tokenizer) -> None:
    """What prepare-data and both trainings do with a table."""
    with documented():
        arguments = PrepareDataArguments(output_file="x.parquet", dataset=str(file), image_size=8, max_pixels=2**22)
        for item in dataset_source(arguments).items:
            render(item, arguments)
    for reader in (lambda: read_rows(str(file)), lambda: ParquetRows([file])):
        with documented():
            rows = reader()
            with documented():
                require_images(rows)
                require_pictures(rows)
                data = PictureDataset(rows, "none", 0)
                PictureCollator()([data[index] for index in range(len(data))])
            with documented():
                require_text(rows, "text")
                data = StreamDataset(rows, tokenizer, 16, "text", 0.5, 0.1, 64, "none", 0)
                if isinstance(rows, datasets.Dataset):
                    data.lengths()
                StreamCollator(tokenizer)(data.__getitems__(list(range(len(data)))))


def as_parquet(content: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(content, file, **options)
    return file.getvalue()


ORIGINALS = [
    GOOD_PARQUET,
    as_parquet(table([HELD] * 4, ["a", None, "b", "c"]), compression="none", use_dictionary=False),
    as_parquet(table([HELD] * 4), compression="zstd", write_page_index=True, data_page_version="2.0"),
    as_parquet(
        table(None, ["a"] * 4, None, image_codes=pa.array([[1] * 16] * 4, pa.list_(pa.int32()))), compression="gzip"
    ),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """The cache of datasets is emptied with the module: ten thousand tables would stay in it."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.config.HF_DATASETS_CACHE = before


@hypothesis.given(data=spoiled(ORIGINALS))
def test_any_spoiled_parquet_file_is_read_or_refused(data, tokenizer, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "spoiled.parquet"
    file.write_bytes(data)
    read_all(file, tokenizer)


small = spoiled([PNG, JPEG, HELD["bytes"]])
held = st.one_of(st.just(HELD["bytes"]), st.just(HELD["bytes"]), small, st.none(), st.binary(max_size=30))
paths = st.one_of(
    st.none(),
    st.sampled_from(["/etc/passwd", "../../x", "http://127.0.0.1:9/x", "a\0b", "zip://a::b", "hf://x"]),
    st.text(max_size=6),
)
cells = st.one_of(st.none(), st.builds(lambda data, path: {"bytes": data, "path": path}, held, paths))
NUMBERS = st.integers(-(2**31), 2**31 - 1)
codes = st.one_of(st.just([1] * 16), st.lists(st.one_of(st.none(), NUMBERS), max_size=20), st.none())
written = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
COLUMNS = {
    "pictures": (PICTURE, cells),
    "lists of pictures": (pa.list_(PICTURE), st.one_of(st.none(), st.lists(cells, max_size=3))),
    "texts": (pa.string(), st.one_of(st.none(), written)),
    "large texts": (pa.large_string(), st.one_of(st.none(), written)),
    "bytes": (pa.binary(), st.one_of(st.none(), st.binary(max_size=8))),
    "numbers": (pa.int64(), st.one_of(st.none(), NUMBERS)),
    "fractions": (pa.float32(), st.one_of(st.none(), st.floats(width=32))),
    "truths": (pa.bool_(), st.one_of(st.none(), st.booleans())),
    "codes": (pa.list_(pa.int32()), codes),
    "lists of codes": (pa.list_(pa.list_(pa.int32())), st.one_of(st.none(), st.lists(codes, max_size=3))),
    "times": (pa.timestamp("ns"), st.one_of(st.none(), st.integers(-(2**63) + 1, 2**63 - 1))),
    "objects": (pa.struct([("a", pa.int32())]), st.one_of(st.none(), st.just({"a": 1}))),
}  # fmt: skip
FEATURES = st.sampled_from([
    {"_type": "Image"}, {"_type": "Value", "dtype": "string"}, {"_type": "Value", "dtype": "int64"}, {"_type": "Audio"},
    {"_type": "ClassLabel", "names": ["a"]}, {"_type": "List", "feature": {"_type": "Image"}}, {"_type": "Evil"}, {}, 3, None,
])  # fmt: skip
NAMES = ["image", "text", "images", "image_codes", "label", "x"]


@st.composite
def tables(draw):
    length = draw(st.integers(0, 4))
    usual = {"image": "pictures", "text": "texts", "images": "lists of pictures", "image_codes": "codes"}
    columns = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4)):
        kind = usual.get(name) if name in usual and draw(st.booleans()) else draw(st.sampled_from(sorted(COLUMNS)))
        arrow, values = COLUMNS[kind]
        columns[name] = pa.array(draw(st.lists(values, min_size=length, max_size=length)), arrow)
    about = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4)) if draw(st.booleans()) else columns:
        plain = {"image": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}}
        about[name] = plain[name] if name in plain and draw(st.booleans()) else draw(FEATURES)
    found = pa.table(columns)
    shown = draw(st.sampled_from([None, json.dumps({"info": {"features": about}}), "{", "3"]))
    return found if shown is None else found.replace_schema_metadata({"huggingface": shown})


@hypothesis.given(content=tables())
def test_any_table_is_read_or_refused(content, tokenizer, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "table.parquet"
    pq.write_table(content, file)
    read_all(file, tokenizer)
