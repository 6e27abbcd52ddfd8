"""`unitok-hf prepare-data`: what becomes of the files that people have, and of the Parquet written from them."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits

from unitok_hf.processing.pixels import PictureError, fit_square, load_rgb
from unitok_hf.training.data import PrepareDataArguments, prepare_data


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out" / "a.parquet"


def prepare(output, **arguments):
    return prepare_data(PrepareDataArguments(output_file=str(output), **arguments))


def rows_of(file) -> list[dict]:
    return pq.read_table(file).to_pylist()


def pixels_of(row) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def left_out(output) -> dict[str, str]:
    """The reason for each item in the list beside the Parquet file."""
    lines = output.with_name(f"{output.stem}.left_out.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["item"]: line["reason"] for line in map(json.loads, lines)}


def files_in(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def picture(seed=0, size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, format, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def half_transparent(color, size=(40, 30)) -> Image.Image:
    """The left half shows `color`, the right half nothing."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste(color, (0, 0, size[0] // 2, size[1]))
    return image


def bomb(width, height) -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def damaged(data: bytes) -> bytes:
    """One byte in the middle of the pixel data has all its bits turned."""
    position = len(data) // 2
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def rotated_by_exif() -> bytes:
    """Stored lying; shown upright (orientation 6), its top left corner is red."""
    upright = Image.new("RGB", (30, 40), "blue")
    upright.paste("red", (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def animation(format, **options) -> bytes:
    return encoded(Image.new("RGB", (40, 30), "red"), format, save_all=True, append_images=[picture(1)], **options)


READABLE = {
    "png.png": encoded(picture(0), "PNG"),
    "jpeg.JPEG": encoded(picture(2), "JPEG"),
    "gif.gif": encoded(picture(3).quantize(), "GIF"),
    "bmp.bmp": encoded(picture(4), "BMP"),
    "deep/er/tiff.tiff": encoded(picture(5), "TIFF", compression="tiff_lzw"),
    "webp.webp": encoded(picture(6), "WEBP"),
    "png_inside.jpg": encoded(picture(7), "PNG"),
    "no_suffix": encoded(picture(8), "PNG"),
    "bilevel.png": encoded(picture(9).convert("1"), "PNG"),
    "cmyk.jpg": encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "JPEG"),
    "exif.jpg": rotated_by_exif(),
    "rgba.png": encoded(half_transparent("red"), "PNG"),
    "palette_alpha.png": encoded(half_transparent("red").quantize(method=Image.Quantize.FASTOCTREE), "PNG"),
    "grey_alpha.png": encoded(half_transparent((0, 0, 0)).convert("LA"), "PNG"),
    "grey16.png": encoded(Image.fromarray(np.full((30, 40), 0x4040, np.uint16)), "PNG"),
    "animated.gif": animation("GIF"),
    "animated.webp": animation("WEBP", lossless=True),
    "animated.png": animation("PNG"),
    "кошка 🍣, 100% 'ok' #1.png": encoded(picture(10), "PNG"),
    unicodedata.normalize("NFD", "café.png"): encoded(picture(11), "PNG"),
    "one_pixel.png": encoded(Image.new("RGB", (1, 1), (200, 30, 30)), "PNG"),
    "panorama.png": encoded(picture(12, (900, 12)), "PNG"),
}

UNREADABLE = {
    "truncated.jpg": (READABLE["jpeg.JPEG"][: len(READABLE["jpeg.JPEG"]) // 2], "truncated"),
    "truncated.png": (READABLE["png.png"][: len(READABLE["png.png"]) // 2], "truncated"),
    "bit_flip.png": (damaged(READABLE["png.png"]), "unreadable"),
    "empty.jpg": (b"", "not an image"),
    "text.png": (b"this is not a picture", "not an image"),
    "not_found.html.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "unreadable"),
    "bomb.png": (bomb(20000, 20000), "too large"),
    "below_pillows_limit.png": (bomb(12000, 9000), "too large"),
    ".DS_Store": (b"\0\0\0\1Bud1", "not an image"),
    "Thumbs.db": (b"\xd0\xcf\x11\xe0", "not an image"),
    "README.txt": (b"pictures of my holidays", "not an image"),
    ".hidden.png": (READABLE["png.png"], "hidden"),
    ".cache/thumbnail.png": (READABLE["png.png"], "hidden"),
}


def write(folder, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def messy(tmp_path) -> Path:
    folder = tmp_path / "messy"
    write(folder, READABLE)
    write(folder, {name: data for name, (data, _) in UNREADABLE.items()})
    write(tmp_path, {"elsewhere/secret.png": encoded(picture(99), "PNG")})
    (folder / "link_out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "link_out").symlink_to(tmp_path / "elsewhere")
    (folder / "link_inside").symlink_to(folder / "deep")
    (folder / "link_to_nothing.png").symlink_to(folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_every_file_is_a_row_or_a_line_with_its_reason(messy, output, capsys):
    report = prepare(output, folder=str(messy))
    reasons = {name: reason for name, (_, reason) in UNREADABLE.items()}
    reasons |= dict.fromkeys(("link_out.png", "link_out", "link_inside", "link_to_nothing.png"), "link")
    reasons["pipe.png"] = "not an image"
    assert left_out(output) == reasons
    assert sorted(row["image"]["path"] for row in rows_of(output)) == sorted(READABLE)
    assert report.rows == len(READABLE)
    assert report.reasons == Counter(reasons.values())
    printed = capsys.readouterr().out
    assert f"{len(READABLE)} rows" in printed
    for reason, count in Counter(reasons.values()).items():
        assert f"{count}  {reason}" in printed


def test_rows_are_sorted_and_the_same_every_time(messy, output):
    prepare(output, folder=str(messy))
    prepare(output.with_name("b.parquet"), folder=str(messy))
    rows = rows_of(output)
    assert rows == rows_of(output.with_name("b.parquet"))
    names = [row["image"]["path"] for row in rows]
    assert names == sorted(names, key=lambda name: name.split("/"))


def test_pictures_are_upright_on_white_and_not_clipped(messy, output):
    prepare(output, folder=str(messy), image_size=20)
    shown = {row["image"]["path"]: pixels_of(row) for row in rows_of(output)}
    assert {image.shape for image in shown.values()} == {(20, 20, 3)}
    red, white = (255, 0, 0), (255, 255, 255)
    for name in ("rgba.png", "palette_alpha.png"):
        assert tuple(shown[name][10, 2]) == red and tuple(shown[name][10, 17]) == white
    assert tuple(shown["grey_alpha.png"][10, 2]) == (0, 0, 0) and tuple(shown["grey_alpha.png"][10, 17]) == white
    assert (shown["grey16.png"] == 0x40).all()
    for name in ("animated.gif", "animated.webp", "animated.png"):
        assert (shown[name] == red).all()
    assert np.abs(shown["cmyk.jpg"].astype(int) - red).max() < 5
    upright = shown["exif.jpg"].astype(int)
    assert np.abs(upright[2, 2] - red).max() < 20
    assert np.abs(upright[[2, 17, 17], [17, 2, 17]] - (0, 0, 255)).max() < 20
    assert (shown["one_pixel.png"] == (200, 30, 30)).all()


def test_a_file_name_that_is_not_unicode_is_written_with_a_replacement_mark(tmp_path, output):
    folder = tmp_path / "old"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        file.write(READABLE["png.png"])
    write(folder, {"metadata.csv": b"file_name,text\n"})
    prepare(output, folder=str(folder))
    assert rows_of(output)[0]["image"]["path"] == "caf\N{REPLACEMENT CHARACTER}.png"


def write_csv(folder, rows, encoding="utf-8"):
    with open(folder / "metadata.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def test_captions_of_a_csv_file(tmp_path, output):
    accented = unicodedata.normalize("NFD", "café.png")
    write(tmp_path / "in", dict.fromkeys(("a.png", "b.png", "c.png", "d.png", accented), READABLE["png.png"]))
    write(tmp_path / "in", {"sub/e.png": READABLE["png.png"]})
    rows = [
        ("file_name", "text"),
        ("a.png", 'a cat, "amber" eyes'),
        ("b.png", "  two\n  lines \t"),
        ("c.png", " "),
        ("a.png", "a second caption"),
        ("café.png", "coffee"),
        ("sub\\e.png", "listed on Windows"),
        ("lost.png", "a file that is not there"),
        ("../in/a.png/../../../a.png", "outside"),
    ]
    write_csv(tmp_path / "in", rows, encoding="utf-8-sig")
    report = prepare(output, folder=str(tmp_path / "in"))
    assert [(row["image"]["path"], row["text"]) for row in rows_of(output)] == [
        ("a.png", 'a cat, "amber" eyes'),
        ("a.png", "a second caption"),
        ("b.png", "two lines"),
        ("c.png", None),
        (accented, "coffee"),
        ("d.png", None),
        ("sub/e.png", "listed on Windows"),
    ]
    assert left_out(output) == {"lost.png": "listed but missing", "../../a.png": "listed but missing"}
    assert report.captioned == 5
    assert "label" not in rows_of(output)[0]


def test_captions_of_json_lines_in_nested_folders(tmp_path, output):
    folder = tmp_path / "in"
    write(folder, dict.fromkeys(("cats/a.png", "cats/old/b.png", "dogs/c.png", "d.png"), READABLE["png.png"]))
    lines = [
        {"file_name": "a.png", "caption": "tabby"},
        {"file_name": "old/b.png", "caption": "人"},
        {"file_name": "x"},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines)
    (folder / "cats" / "metadata.jsonl").write_text(text, encoding="utf-8")
    (folder / "dogs" / "metadata.csv").write_text("file_name,caption\nc.png,poodle\n", encoding="utf-8")
    prepare(output, folder=str(folder), text_column="caption")
    assert [row["text"] for row in rows_of(output)] == ["tabby", "人", None, "poodle"]
    assert left_out(output) == {"cats/x": "listed but missing"}


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("metadata.csv", "file_name,caption\na.png,x\n", "no column text, only file_name, caption"),
        ("metadata.csv", "name;text\na.png;x\n", "no column file_name"),
        ("metadata.csv", "file_name,text\na.png,a cat, with eyes\n", "line 2 has more fields than the header"),
        ("metadata.csv", 'file_name,text\na.png,"never closed\n', "after line 1: unexpected end of data"),
        ("metadata.csv", "file_name,text\na.png,caf\udce9\n", "not UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name"\n', "after line 2"),
        ("metadata.jsonl", '["a.png"]\n', "line 1 is not a JSON object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 7}\n', "must be text"),
    ],
)
def test_a_malformed_metadata_file_is_refused(tmp_path, output, name, text, message):
    write(tmp_path / "in", {"a.png": READABLE["png.png"], name: text.encode("utf-8", "surrogateescape")})
    with pytest.raises(ValueError, match=message) as error:
        prepare(output, folder=str(tmp_path / "in"))
    assert name in str(error.value)
    assert not output.parent.exists()


def test_two_metadata_files_in_one_folder_are_refused(tmp_path, output):
    write(tmp_path / "in", {"a.png": READABLE["png.png"], "metadata.csv": b"file_name,text\n", "metadata.jsonl": b""})
    with pytest.raises(ValueError, match="both list captions"):
        prepare(output, folder=str(tmp_path / "in"))


def test_class_folders_give_labels_and_captions(tmp_path, output):
    names = ["polar_bear/a.png", "polar_bear/cubs/b.png", "red-fox/c.jpg", "d.png", ".trash/e.png"]
    write(tmp_path / "in", dict.fromkeys(names, READABLE["png.png"]) | {"notes/plan.txt": b"look for otters"})
    report = prepare(output, folder=str(tmp_path / "in"), caption_template="one {label}, alive")
    assert report.class_names == ["polar_bear", "red-fox"]
    assert [(row["image"]["path"], row["text"], row["label"]) for row in rows_of(output)] == [
        ("d.png", None, None),
        ("polar_bear/a.png", "one polar bear, alive", 0),
        ("polar_bear/cubs/b.png", "one polar bear, alive", 0),
        ("red-fox/c.jpg", "one red fox, alive", 1),
    ]


def test_one_folder_of_pictures_is_no_class(tmp_path, output):
    write(tmp_path / "in", {"images/a.png": READABLE["png.png"], "notes/plan.txt": b""})
    prepare(output, folder=str(tmp_path / "in"))
    assert [set(row) for row in rows_of(output)] == [{"image", "text"}]
    assert rows_of(output)[0]["text"] is None


def test_duplicates_are_equal_pixels_not_equal_bytes(tmp_path, output):
    resaved = encoded(picture(0).convert("RGBA"), "PNG", compress_level=1)
    assert resaved != READABLE["png.png"]
    wide, tall = encoded(Image.new("RGB", (40, 20)), "PNG"), encoded(Image.new("RGB", (20, 40)), "PNG")
    files = {
        "a.png": READABLE["png.png"],
        "b.png": READABLE["png.png"],
        "c.png": resaved,
        "d.png": wide,
        "e.png": tall,
    }
    write(tmp_path / "in", files)
    write_csv(tmp_path / "in", [("file_name", "text"), ("a.png", "first caption"), ("a.png", "second caption")])
    prepare(output, folder=str(tmp_path / "in"), drop_duplicates=True)
    assert left_out(output) == {"b.png": "duplicate", "c.png": "duplicate"}
    assert [row["image"]["path"] for row in rows_of(output)] == ["a.png", "a.png", "d.png", "e.png"]
    assert prepare(output.with_name("b.parquet"), folder=str(tmp_path / "in")).rows == 6


def test_small_and_large_pictures_are_left_out_on_demand(tmp_path, output):
    sizes = {"small.png": (20, 50), "good.png": (30, 30), "large.png": (60, 60)}
    write(tmp_path / "in", {name: encoded(picture(0, size), "PNG") for name, size in sizes.items()})
    report = prepare(output, folder=str(tmp_path / "in"), min_size=21, max_pixels=3599, image_size=30)
    assert left_out(output) == {"small.png": "too small", "large.png": "too large"}
    assert report.enlarged == 0
    assert prepare(output.with_name("b.parquet"), folder=str(tmp_path / "in"), image_size=50).enlarged == 2


def test_strict_writes_nothing_if_anything_would_be_left_out(messy, output):
    with pytest.raises(ValueError, match=r"^\.DS_Store: not an image"):
        prepare(output, folder=str(messy), strict=True)
    assert files_in(output.parent) == []


def test_a_source_without_any_usable_picture_is_an_error(tmp_path, output):
    write(tmp_path / "in", {"a.png": b"", "b.png": b"text"})
    with pytest.raises(ValueError, match="2 not an image"):
        prepare(output, folder=str(tmp_path / "in"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare(output, folder=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="is inside --folder"):
        prepare(tmp_path / "in" / "a.parquet", folder=str(tmp_path / "in"))
    assert files_in(output.parent) == [] and files_in(tmp_path / "in") == ["a.png", "b.png"]


def test_an_existing_output_is_not_touched(tmp_path, output):
    write(tmp_path / "in", {"a.png": READABLE["png.png"]})
    output.parent.mkdir()
    for name in ("a.parquet", "a-00000-of-00002.parquet", "a.left_out.jsonl"):
        kept = output.with_name(name)
        kept.write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=name):
            prepare(output, folder=str(tmp_path / "in"))
        assert kept.read_bytes() == b"mine" and files_in(output.parent) == [name]
        kept.unlink()
    stale = output.parent / ".a.4711"
    write(stale, {"0.parquet": b"left by a run that was killed"})
    output.with_name("aa.parquet").write_bytes(b"mine")
    prepare(output, folder=str(tmp_path / "in"))
    assert files_in(output.parent) == [".a.4711", "a.parquet", "aa.parquet"]


def test_datasets_and_the_hub_read_the_parquet_without_being_told(tmp_path, output):
    names = [f"{kind}/{index}.png" for kind in ("cat", "dog") for index in range(3)]
    write(tmp_path / "in", {name: encoded(picture(seed), "PNG") for seed, name in enumerate(names)})
    write(tmp_path / "in", {"broken.png": b""})
    prepare(output, folder=str(tmp_path / "in"), image_size=24)
    schema = pq.read_schema(output)
    assert schema.types[:2] == [pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string()]
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}
    for data in (
        load_dataset("parquet", data_files=str(output), split="train"),
        load_dataset("parquet", data_files=str(output), split="train", streaming=True),
        load_dataset(str(output.parent), split="train"),
    ):
        rows = list(data)
        assert [row["text"] for row in rows] == ["a photo of a cat"] * 3 + ["a photo of a dog"] * 3
        assert [data.features["label"].names[row["label"]] for row in rows] == ["cat"] * 3 + ["dog"] * 3
        for seed, row in enumerate(rows):
            assert row["image"].mode == "RGB" and not row["image"].getexif()
            np.testing.assert_array_equal(row["image"], fit_square(picture(seed), 24))


def cifar_archive_of(path, records_per_batch=300, bad_label=None) -> np.ndarray:
    """A CIFAR-10 archive of random pictures, in the official layout. Returns all training records."""
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (5, records_per_batch, 3073), dtype=np.uint8)
    records[:, :, 0] = np.arange(records_per_batch) % 3
    if bad_label is not None:
        records[3, 7, 0] = bad_label
    batches = {f"data_batch_{number + 1}.bin": records[number].tobytes() for number in (0, 4, 3, 2, 1)}
    batches |= {"test_batch.bin": records[0, :10].tobytes(), "batches.meta.txt": b"airplane\nautomobile\nbird\n\n"}
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return records.reshape(-1, 3073)


def test_cifar_comes_out_of_the_binary_archive(tmp_path, output):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    records = cifar_archive_of(archive, records_per_batch=11)
    prepare(output, cifar_archive=str(archive), image_size=32)
    rows = rows_of(output)
    assert len(rows) == 55
    for row, record in zip(rows, records, strict=True):
        np.testing.assert_array_equal(pixels_of(row), record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        assert row["label"] == record[0]
    assert [row["text"] for row in rows[:3]] == [
        "a photo of a airplane",
        "a photo of a automobile",
        "a photo of a bird",
    ]
    assert rows[12]["image"]["path"] == "data_batch_2/00001"
    assert prepare(output.with_name("test.parquet"), cifar_archive=str(archive), split="test").rows == 10


def test_archives_that_are_not_the_binary_cifar_are_refused(tmp_path, output):
    good = tmp_path / "good.tar.gz"
    cifar_archive_of(good, records_per_batch=11)
    python_version = tmp_path / "python.tar.gz"
    with tarfile.open(python_version, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    broken = {
        "truncated.tar.gz": good.read_bytes()[:-5000],
        "flipped.tar.gz": damaged(good.read_bytes()),
        "odd.tar.gz": gzip.compress(
            gzip.decompress(good.read_bytes()).replace(b"cifar-10-batches-bin/data_batch_1", b"x")
        ),
        "page.tar.gz": b"<html>moved</html>",
        "empty.tar.gz": b"",
        "python.tar.gz": python_version.read_bytes(),
    }
    write(tmp_path, broken)
    for name in broken:
        with pytest.raises(ValueError, match=name):
            prepare(output, cifar_archive=str(tmp_path / name))
    with pytest.raises(ValueError, match="the one called binary"):
        prepare(output, cifar_archive=str(python_version))
    with pytest.raises(ValueError, match="train and test"):
        prepare(output, cifar_archive=str(good), split="validation")
    with pytest.raises(FileNotFoundError, match="nothing.tar.gz"):
        prepare(output, cifar_archive=str(tmp_path / "nothing.tar.gz"))
    assert files_in(output.parent) == []


def test_a_source_that_breaks_in_the_middle_leaves_nothing(tmp_path, output):
    archive = tmp_path / "cifar.tar.gz"
    cifar_archive_of(archive, bad_label=77)
    with pytest.raises(ValueError, match="record 7 of data_batch_4.bin is of class 77"):
        prepare(output, cifar_archive=str(archive), max_rows_per_shard=100)
    assert files_in(output.parent) == []


def test_a_full_disk_leaves_nothing(tmp_path, output):
    archive = tmp_path / "cifar.tar.gz"
    cifar_archive_of(archive)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large|No space"):
            prepare(output, cifar_archive=str(archive), image_size=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_in(output.parent) == []


def test_shards_are_numbered_and_bounded(tmp_path, output):
    archive = tmp_path / "cifar.tar.gz"
    records = cifar_archive_of(archive, records_per_batch=60)
    report = prepare(output, cifar_archive=str(archive), image_size=32, max_rows_per_shard=130)
    names = [f"a-0000{number}-of-00003.parquet" for number in range(3)]
    assert files_in(output.parent) == names == [file.name for file in report.files]
    assert [pq.read_metadata(file).num_rows for file in report.files] == [130, 130, 40]
    data = load_dataset("parquet", data_files=str(output.parent / "a-*.parquet"), split="train")
    assert data["label"][:] == records[:, 0].tolist()
    exact = prepare(output.with_name("b.parquet"), cifar_archive=str(archive), image_size=32, max_rows_per_shard=300)
    assert [file.name for file in exact.files] == ["b.parquet"]


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, output):
    peaks = []
    for records_per_batch in (60, 480):
        archive = tmp_path / "cifar.tar.gz"
        cifar_archive_of(archive, records_per_batch)
        tracemalloc.start()
        prepare(output.with_name(f"{records_per_batch}.parquet"), cifar_archive=str(archive), image_size=32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
    groups = pq.ParquetFile(output.with_name("480.parquet")).metadata
    assert max(groups.row_group(index).num_rows for index in range(groups.num_row_groups)) <= 256


def test_digits_have_a_fixed_part_held_out(output):
    prepare(output, builtin="digits", caption_template="a handwritten {label}", image_size=8)
    prepare(output.with_name("test.parquet"), builtin="digits", split="test", image_size=8)
    train, test = rows_of(output), rows_of(output.with_name("test.parquet"))
    assert (len(train), len(test)) == (1400, 397)
    assert min(Counter(row["label"] for row in test).values()) >= 38
    digits = load_digits()
    seen = []
    for row in train + test:
        index = int(row["image"]["path"].removeprefix("digits/"))
        seen.append(index)
        np.testing.assert_array_equal(pixels_of(row)[..., 0], np.rint(digits.images[index] * 255 / 16))
        assert row["label"] == digits.target[index]
    assert sorted(seen) == list(range(1797))
    words = "zero one two three four five six seven eight nine".split()
    assert [row["text"] for row in train] == [f"a handwritten {words[row['label']]}" for row in train]


@pytest.fixture
def table(tmp_path) -> Path:
    """A data set with everything that a column of pictures, texts or labels may hold."""
    features = Features(
        {
            "picture": ImageFeature(),
            "raw": Value("binary"),
            "words": Value("string"),
            "kind": ClassLabel(names=["cat", "dog"]),
            "name": Value("string"),
            "count": Value("int64"),
            "size": Value("float32"),
        }
    )
    good, bad = READABLE["png.png"], UNREADABLE["truncated.png"][0]
    columns = {
        "picture": [{"bytes": data, "path": None} for data in (good, good, bad)] + [None],
        "raw": [good] * 4,
        "words": ["a tabby", None, "broken", "empty"],
        "kind": [0, 1, 0, -1],
        "name": ["tom", "rex", "pip", None],
        "count": [1, 2, 3, 4],
        "size": [0.5] * 4,
    }
    file = tmp_path / "data" / "table.parquet"
    file.parent.mkdir()
    Dataset.from_dict(columns, features=features).to_parquet(file)
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_any_data_set_can_be_a_source(table, output, streaming, whole_folder):
    prepare(
        output,
        dataset=str(table.parent if whole_folder else table),
        image_column="picture",
        text_column="words",
        label_column="kind",
        streaming=streaming,
    )
    assert [(row["image"]["path"], row["text"], row["label"]) for row in rows_of(output)] == [
        ("train/0", "a tabby", 0),
        ("train/1", "a photo of a dog", 1),
    ]
    assert left_out(output) == {"train/2": "truncated", "train/3": "listed but missing"}


def test_raw_bytes_and_unnamed_classes_can_be_a_source(table, output):
    prepare(output, dataset=str(table), image_column="raw", label_column="name")
    assert [(row["text"], set(row)) for row in rows_of(output)] == [
        ("a photo of a tom", {"image", "text"}),
        ("a photo of a rex", {"image", "text"}),
        ("a photo of a pip", {"image", "text"}),
        (None, {"image", "text"}),
    ]
    prepare(
        output.with_name("b.parquet"),
        dataset=str(table),
        image_column="raw",
        label_column="count",
        caption_template="{label} cats",
        split="train[1:3]",
    )
    assert [row["text"] for row in rows_of(output.with_name("b.parquet"))] == ["2 cats", "3 cats"]
    prepare(output.with_name("c.parquet"), dataset=str(table), image_column="raw", label_column="kind")
    assert [row["label"] for row in rows_of(output.with_name("c.parquet"))] == [0, 1, 0, None]
    assert rows_of(output.with_name("c.parquet"))[3]["text"] is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_read_by_the_datasets_library_can_be_a_source(tmp_path, output, streaming):
    write(tmp_path / "in", {f"{kind}/{n}.png": READABLE["png.png"] for kind in ("cat", "dog") for n in range(2)})
    write(tmp_path / "in", {"cat/broken.png": UNREADABLE["truncated.png"][0]})
    prepare(output, dataset=str(tmp_path / "in"), label_column="label", streaming=streaming)
    assert [row["text"] for row in rows_of(output)] == ["a photo of a cat"] * 2 + ["a photo of a dog"] * 2
    assert list(left_out(output).values()) == ["truncated"]


def test_pictures_inside_an_archive_can_be_streamed(tmp_path, output):
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "all.zip", "w") as archive:
        for seed in range(3):
            archive.writestr(f"{seed}.png", encoded(picture(seed), "PNG"))
    data = load_dataset(str(tmp_path / "in"), split="train", streaming=True)
    rows = list(data.cast_column("image", ImageFeature(decode=False)))
    assert [row["image"]["bytes"] for row in rows] == [None] * 3 and "zip://" in rows[0]["image"]["path"]
    prepare(output, dataset=str(tmp_path / "in"), streaming=True, image_size=24)
    for seed, row in enumerate(rows_of(output)):
        np.testing.assert_array_equal(pixels_of(row), fit_square(picture(seed), 24))


class Dangerous:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return open, ("unpickled", "w")


@pytest.fixture
def shards(tmp_path, monkeypatch) -> Path:
    """Two WebDataset shards of three samples; the fifth picture is cut off, and each has a pickle with it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(3 * shard, 3 * shard + 3):
                data = UNREADABLE["truncated.png"][0] if number == 4 else encoded(picture(number), "PNG")
                files = {"png": data, "txt": f"picture {number}".encode(), "pickle": pickle.dumps(Dangerous())}
                for kind, content in files.items():
                    member = tarfile.TarInfo(f"{number:06d}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards_can_be_a_source(shards, output, streaming):
    common = {"image_column": "png", "text_column": "txt", "streaming": streaming, "image_size": 24}
    prepare(output, dataset=str(shards), **common)
    assert [row["text"] for row in rows_of(output)] == [f"picture {number}" for number in (0, 1, 2, 3, 5)]
    for number, row in zip((0, 1, 2, 3, 5), rows_of(output), strict=True):
        np.testing.assert_array_equal(pixels_of(row), fit_square(picture(number), 24))
    assert left_out(output) == {"train/4": "truncated"}
    prepare(output.with_name("one.parquet"), dataset=str(shards / "00000.tar"), **common)
    assert rows_of(output.with_name("one.parquet")) == rows_of(output)[:3]
    assert not Path("unpickled").exists()


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "--image_column image: there is no such column, only picture, raw, words"),
        ({"image_column": "picture", "text_column": "caption"}, "--text_column caption: there is no such column"),
        ({"image_column": "picture", "label_column": "class"}, "--label_column class: there is no such column"),
        ({"image_column": "count"}, "which cannot serve as that"),
        ({"image_column": "picture", "text_column": "count"}, "which cannot serve as that"),
        ({"image_column": "picture", "label_column": "size"}, "which cannot serve as that"),
    ],
)
def test_columns_that_are_not_there_or_do_not_fit_are_refused(table, output, columns, message):
    with pytest.raises(ValueError, match=message):
        prepare(output, dataset=str(table), **columns)


def test_data_sets_that_cannot_be_loaded_are_refused(tmp_path, table, output):
    write(tmp_path, {"bad.parquet": b"PAR1 and nothing else", "table.csv": b"text\n"})
    with pytest.raises(ValueError, match="Unknown split"):
        prepare(output, dataset=str(table), image_column="picture", split="test")
    with pytest.raises(ValueError, match="not a parquet file"):
        prepare(output, dataset=str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match="only .parquet and .tar can be read"):
        prepare(output, dataset=str(tmp_path / "table.csv"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare(output, dataset=str(tmp_path / "nowhere" / "else"))


def test_cifar_without_network_points_to_the_archive(output):
    with pytest.raises(OSError, match="--cifar_archive"):
        prepare(output, download_cifar=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "one source must be given, there is none"),
        ({"folder": "in", "builtin": "digits"}, "not 2 \\(--folder --builtin\\)"),
        ({"folder": ""}, "--folder is empty"),
        ({"folder": "in", "label_column": "x"}, "--label_column has no meaning for --folder, only for --dataset"),
        ({"folder": "in", "split": "test"}, "--split has no meaning for --folder"),
        ({"builtin": "digits", "split": "validation"}, "the digits have train and test"),
        ({"builtin": "digits", "image_size": 0}, "--image_size must be at least 1"),
        ({"builtin": "digits", "max_rows_per_shard": 0}, "--max_rows_per_shard must be at least 1"),
        ({"builtin": "digits", "caption_template": "a photo"}, "must contain {label}"),
        ({"builtin": "digits", "caption_template": "a {label} of {name}"}, "must contain {label}"),
        ({"builtin": "digits", "caption_template": "a {label.x}"}, "must contain {label}"),
        ({"builtin": "digits", "caption_template": "a {label:>9}"}, "must contain {label}"),
        ({"builtin": "digits", "caption_template": "a {label"}, "--caption_template"),
    ],
)
def test_contradictory_arguments_are_refused_before_any_work(output, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(output, **arguments)
    assert not output.parent.exists()


def test_the_output_must_be_a_parquet_file(tmp_path):
    for name in (None, str(tmp_path / "out")):
        with pytest.raises(ValueError, match="must name a .parquet file"):
            prepare_data(PrepareDataArguments(builtin="digits", output_file=name))


def test_a_picture_of_the_right_size_keeps_its_pixels():
    np.testing.assert_array_equal(fit_square(picture(0, (64, 64)), 64), picture(0, (64, 64)))


def test_the_centre_is_kept():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    for turned in (image, image.rotate(90, expand=True)):
        assert (np.asarray(fit_square(turned, 20))[2:-2, 2:-2] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(np.array([[0, 257, 65535]], np.uint16)), [0, 1, 255]),
        (Image.fromarray(np.array([[0, 257, 65535]], np.int32)), [0, 1, 255]),
        (Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), [0, 51, 255]),
    ],
)
def test_deep_grey_is_scaled(image, expected):
    assert np.asarray(load_rgb(image))[0].tolist() == [[level] * 3 for level in expected]
    assert np.asarray(load_rgb(encoded(image, "TIFF")))[0].tolist() == [[level] * 3 for level in expected]


@pytest.mark.parametrize(
    "values", [np.array([[-1, 5]], np.int32), np.array([[0, 65536]], np.int32), [[np.nan]], [[255]]]
)
def test_deep_grey_without_a_known_scale_is_refused(values):
    with pytest.raises(PictureError, match="grey values"):
        load_rgb(Image.fromarray(np.asarray(values, getattr(values, "dtype", np.float32))))


def test_a_transparent_value_of_deep_grey_is_white():
    image = Image.fromarray(np.array([[7000, 0]], np.uint16))
    assert np.asarray(load_rgb(encoded(image, "PNG", transparency=7000)))[0, :, 0].tolist() == [255, 0]


def test_a_picture_in_memory_is_left_as_it_was():
    image = half_transparent("red")
    image.info["comment"] = "mine"
    before = image.copy()
    assert load_rgb(image).getpixel((39, 0)) == (255, 255, 255)
    assert image == before and image.info == {"comment": "mine"} and load_rgb(image).info == {}
    with pytest.raises(PictureError) as error:
        load_rgb(image, max_pixels=1199)
    assert error.value.reason == "too large"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_is_wrong_in_a_file_is_one_kind_of_error():
    generator = random.Random(0)
    for _ in range(2000):
        data = bytearray(generator.choice(list(READABLE.values())))
        for _ in range(3):
            data[generator.randrange(min(len(data), 300))] = generator.randrange(256)
        try:
            load_rgb(bytes(data[: generator.randrange(len(data))]), max_pixels=100_000)
        except PictureError as error:
            assert error.reason in ("not an image", "truncated", "unreadable", "too large") and error.detail
