"""Hostile files, made when they are needed: what a stranger may send, and what must happen.

    for case in cases("tokenizer"):  case.make(folder)   writes the file, or spoils the good one that is there
                                     case.outcome        "refused": ValueError or OSError that says what is wrong
                                                         "harmless": it is read as if the hostile part were not there
                                                         else: the reason for which prepare-data leaves the picture out

| kind      | the file                                              | read by                                             |
|-----------|-------------------------------------------------------|-----------------------------------------------------|
| picture   | one picture in a folder                               | prepare_data --folder                               |
| listing   | metadata.csv, metadata.jsonl, links, odd file names   | prepare_data --folder                               |
| archive   | a tar that should be cifar-10-binary.tar.gz           | prepare_data --cifar_archive                        |
| table     | a Parquet file                                        | prepare_data --dataset; read_rows and both datasets |
| tokenizer | a folder of an image tokenizer                        | UniTokVQModel.from_pretrained                       |
| config    | config.json                                           | UniTokConfig.from_pretrained                        |
| model     | a folder of a model                                   | AutoModel.from_pretrained, load_model               |
| processor | the files of a processor                              | AutoProcessor.from_pretrained, load_model           |
| arguments | a file of arguments                                   | the command line                                    |

    python tests/reliability/hostile_corpus.py      prints how many there are of each kind
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


REFUSED, HARMLESS = "refused", "harmless"
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
DIGITS = "9" * 5_000
MARKER = "HOSTILE_MARKER"  # names the environment variable with the file that a pickle or remote code would write


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Args:
        make: is given a folder, and the path of the file there for the kinds that are single files.
    """

    kind: str
    name: str
    outcome: str
    make: Callable[[Path], object]

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


class Bomb:
    """Writes the marker when it is unpickled."""

    def __reduce__(self):
        return (eval, (f"open(__import__('os').environ['{MARKER}'], 'w').close()",))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(size=(64, 64), mode="RGB", format="PNG", **options) -> bytes:
    return encoded(Image.new(mode, size, 0), format, **options)


def noise(format="PNG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, depth=8, colour=2, data=bytes(100), extra=b"") -> bytes:
    """A PNG whose header claims a size that its data need not have."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_exif(exif: bytes) -> bytes:
    return noise("JPEG", exif=b"Exif\0\0" + exif)


def tiff_directory(*entries: tuple[int, int, int, int]) -> bytes:
    """EXIF of raw entries: tag, type, count, value or offset."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    ) + bytes(4)  # fmt: skip


def gif_of(width, height) -> bytes:
    good = bytearray(png(format="GIF"))
    good[6:10] = struct.pack("<HH", width, height)
    return bytes(good)


def bmp_of(width, height) -> bytes:
    good = bytearray(png(format="BMP"))
    good[18:26] = struct.pack("<ii", width, height)
    return bytes(good)


def icc_bomb() -> bytes:
    return png_of(8, 8, data=bytes(8 * 25), extra=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64 * 2**20))))


def text_bomb() -> bytes:
    return png_of(8, 8, data=bytes(8 * 25), extra=chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(64 * 2**20))))


def many_chunks() -> bytes:
    return png_of(8, 8, data=bytes(8 * 25), extra=b"".join(chunk(b"tEXt", b"a\0b") for _ in range(20_000)))


JPEG, PNG, WEBP, GIF, TIFF = noise("JPEG"), noise(), noise("WEBP"), noise("GIF"), noise("TIFF")

PICTURES = {
    "too large": {
        "eps with a size of 10^9": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1000000000 9\n%%EndComments\n",
        "png that claims 400 megapixels": png_of(20_000, 20_000),
        "png that claims 108 megapixels": png_of(12_000, 9_000, depth=1, colour=0),
        "png that claims 2 billion a side": png_of(2**31 - 1, 2**31 - 1),
        "png of 100 megapixels in 12 kB": png_of(10_000, 10_000, 1, 0, bytes(10_000 * 1_251)),
        "bmp that claims 2 billion a side": bmp_of(2**31 - 1, 2**31 - 1),
    },
    "truncated": {
        "png with a header of no size": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"") + chunk(b"IEND", b""),
        "ppm without pixels": b"P6\n64 64\n255\n",
        "tiff cut in half": TIFF[: len(TIFF) // 2],
        "jpeg cut in half": JPEG[: len(JPEG) // 2],
        "png cut in half": PNG[: len(PNG) // 2],
        "png without its end": PNG[:-30],
        "bmp cut in half": noise("BMP")[:4_000],
    },
    "unreadable": {
        "webp header alone": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "png with a byte turned": PNG[:900] + bytes([PNG[900] ^ 0xFF]) + PNG[901:],
        "png that is PostScript inside": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "eps that would run a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
        b"(%pipe%touch /tmp/evil) (w) file\n",
        "float tiff that is not a number": encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"),
        "webp cut in half": WEBP[: len(WEBP) // 2],
    },
    "not an image": {
        "tiff of 2^31 strips": b"II*\0\x08\0\0\0"
        + tiff_directory((256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 2**31, 0))[8:],
        "png with a false checksum": PNG[:40] + bytes(4) + PNG[44:],
        "png that claims no width": png_of(0, 64),
        "empty": b"",
        "a text": b"this is not a picture",
        "a page": b"<html><body>404 Not Found</body></html>",
        "a pickle": pickle.dumps(Bomb()),
        "zeros": bytes(1_000),
        "png magic alone": b"\x89PNG\r\n\x1a\n",
        "jpeg magic alone": b"\xff\xd8\xff",
        "gif magic alone": b"GIF89a",
        "svg with an entity bomb": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]><svg>&a;</svg>',
        "zip": b"PK\x03\x04" + bytes(60),
        "elf": b"\x7fELF" + bytes(60),
        "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    },
    HARMLESS: {
        "png named jpg": PNG,
        "jpeg named png": JPEG,
        "gif named png": GIF,
        "exif orientation 0": with_exif(tiff_directory((0x0112, 3, 1, 0))),
        "exif orientation 99": with_exif(tiff_directory((0x0112, 3, 1, 99))),
        "exif orientation of text": with_exif(tiff_directory((0x0112, 2, 4, 0x41414141))),
        "exif orientation of 10^9 values": with_exif(tiff_directory((0x0112, 3, 10**9, 8))),
        "exif that points at itself": with_exif(tiff_directory((0x8769, 4, 1, 8))),
        "exif that points beyond": with_exif(tiff_directory((0x010E, 2, 2**31, 2**31))),
        "exif of 65535 entries": with_exif(b"II*\0\x08\0\0\0\xff\xff" + bytes(60)),
        "exif of noise": with_exif(bytes(range(256)) * 50),
        "exif that is empty": with_exif(b""),
        "place where it was taken": with_exif(tiff_directory((0x8825, 4, 1, 26))),
        "trailing pickle": PNG + pickle.dumps(Bomb()),
        "20,000 comments": many_chunks(),
        "one pixel": png((1, 1)),
        "one row of 60,000": png((60_000, 1)),
        "16 bits": png(mode="I;16"),
        "bilevel": png(mode="1"),
        "cmyk": png(mode="CMYK", format="JPEG"),
    },
}


def write_picture(folder: Path, content: bytes) -> None:
    (folder / "hostile.png").write_bytes(content)


def write_files(files: dict[str, bytes | str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def listing(text: str | bytes, name: str = "metadata.csv") -> Callable[[Path], None]:
    return write_files({"a.png": png(), name: text})


def link(target: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "a.png").write_bytes(png())
        (folder / "link.png").symlink_to(target)

    return make


def pipe(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    os.mkfifo(folder / "pipe.png")


def line(**values) -> str:
    return json.dumps(values) + "\n"


LISTINGS = {
    REFUSED: {
        "not utf-8": listing(b"file_name,text\na.png,\xff\xfe\n"),
        "no columns": listing(""),
        "no file_name": listing("name,text\na.png,x\n"),
        "no text": listing("file_name,caption\na.png,x\n"),
        "too many fields": listing("file_name,text\na.png,x,y\n"),
        "open quote": listing('file_name,text\na.png,"open\n'),
        "a field of a megabyte": listing("file_name,text\na.png," + "x" * 2**20 + "\n"),
        "no json": listing("{", "metadata.jsonl"),
        "json that is a list": listing("[]\n", "metadata.jsonl"),
        "json of numbers": listing(line(file_name=3, text=4), "metadata.jsonl"),
        "json nested deeply": listing(DEEP, "metadata.jsonl"),
        "json of 5,000 digits": listing('{"file_name": ' + DIGITS + "}", "metadata.jsonl"),
        "json text that is a list": listing(line(file_name="a.png", text=[]), "metadata.jsonl"),
        "half a surrogate in a caption": listing('{"file_name": "a.png", "text": "\\ud800"}\n', "metadata.jsonl"),
        "json without file_name": listing(line(text="x"), "metadata.jsonl"),
        "two listings": write_files({"a.png": png(), "metadata.csv": "file_name,text\n", "metadata.jsonl": "{}\n"}),
    },
    "listed but missing": {
        "climbs out": listing("file_name,text\n../../../../etc/passwd,x\n"),
        "absolute": listing("file_name,text\n/etc/passwd,x\n"),
        "climbs with backslashes": listing("file_name,text\n..\\..\\secret.png,x\n"),
        "climbs inside": listing("file_name,text\nb/../../x.png,x\n"),
        "an address": listing("file_name,text\nhttp://127.0.0.1:9/a.png,x\n"),
        "a zero byte": listing(line(file_name="a\0.png", text="x"), "metadata.jsonl"),
        "a name of a megabyte": listing(line(file_name="a" * 2**20, text="x"), "metadata.jsonl"),
        "half a surrogate": listing('{"file_name": "\\ud800.png", "text": "x"}\n', "metadata.jsonl"),
        "the folder itself": listing("file_name,text\n.,x\n"),
        "an empty name": listing(line(file_name="", text="x"), "metadata.jsonl"),
    },
    "link": {
        "link to a secret": link("/etc/passwd"),
        "link to nothing": link("/nonexistent/x"),
        "link to itself": link("link.png"),
        "link to the root": link("/"),
        "link upwards": link(".."),
    },
    "not an image": {"pipe that nobody writes to": pipe},
    HARMLESS: {
        "control tokens in a caption": listing("file_name,text\na.png,<|image_start|><|bos|>\n"),
        "a zero byte in a caption": listing('{"file_name": "a.png", "text": "\\u0000"}\n', "metadata.jsonl"),
        "byte order mark": listing(b"\xef\xbb\xbffile_name,text\na.png,x\n"),
    },
}


def archive(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            found = tarfile.TarInfo(name)
            found.size = len(content)
            tar.addfile(found, io.BytesIO(content))
        for name, target in (links or {}).items():
            found = tarfile.TarInfo(name)
            found.type, found.linkname = tarfile.SYMTYPE, target
            tar.addfile(found)
    return file.getvalue()


RECORD = bytes([0]) + bytes(3_072)
CIFAR = {f"data_batch_{number}.bin": RECORD for number in range(1, 6)} | {"batches.meta.txt": b"cat\ndog\n"}
ARCHIVES = {
    REFUSED: {
        "empty": b"",
        "a text": b"hello",
        "cut": archive(CIFAR)[:100],
        "no batches": archive({"a": b""}),
        "pickles of the python version": archive({"data_batch_1": pickle.dumps(Bomb())}),
        "a record that is cut": archive(CIFAR | {"data_batch_1.bin": RECORD[:-1]}),
        "a class without a name": archive(CIFAR | {"data_batch_1.bin": bytes([9]) + bytes(3_072)}),
        "names that are not utf-8": archive(CIFAR | {"batches.meta.txt": b"\xff\xfe"}),
        "links in place of batches": archive({"batches.meta.txt": b"cat"}, {"data_batch_1.bin": "/etc/passwd"}),
        "no picture": archive(dict.fromkeys(CIFAR, b"")),
    },
    HARMLESS: {
        "members that climb out": archive(CIFAR | {"../../evil": b"x", "/tmp/evil": b"x"}),
        "a link that leads out": archive(CIFAR, {"x": "/etc/passwd"}),
    },
}


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXTS = ["a red circle"] * 4
HELD = {"bytes": png(), "path": None}


def value(kind: str) -> dict:
    return {"dtype": kind, "_type": "Value"}


def features(**kinds) -> dict:
    return {"info": {"features": kinds}}


IMAGE = {"_type": "Image"}
USUAL = features(image=IMAGE, text=value("string"))


def table(pictures=None, texts=TEXTS, about=USUAL, image_type=PICTURE, text_type=None, **columns) -> pa.Table:
    text_type = text_type or pa.string()
    found = {} if pictures is None else {"image": pa.array(pictures, image_type)}
    found |= {} if texts is None else {"text": pa.array(texts, text_type)}
    about = about if isinstance(about, str) or about is None else json.dumps(about)
    return pa.table(found | columns).replace_schema_metadata(about and {"huggingface": about})


def named(path: str) -> pa.Table:
    return table([{"bytes": None, "path": path}] * 4)


def coded(codes, kind=None) -> pa.Table:
    return table(None, TEXTS, None, image_codes=pa.array(codes, kind or pa.list_(pa.int32())))


def listed(pictures) -> pa.Table:
    about = features(images={"feature": IMAGE, "_type": "List"}, text=value("string"))
    return table(None, TEXTS, about, images=pa.array([pictures] * 4, pa.list_(PICTURE)))


def bad_utf8() -> pa.Array:
    offsets = struct.pack("<5i", 0, 1, 2, 3, 4)
    return pa.Array.from_buffers(pa.string(), 4, [None, pa.py_buffer(offsets), pa.py_buffer(b"\xff\xfe\xff\xff")])


def parquet_bytes(content: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(content, file, **options)
    return file.getvalue()


GOOD_TABLE = table([HELD] * 4)
GOOD_PARQUET = parquet_bytes(GOOD_TABLE)
LISTS = pa.list_(pa.list_(pa.int32()))

# By what must happen when it is read for: prepare-data, training of a tokenizer, training of a GPT.
TABLES: dict[tuple[str, str, str], dict[str, pa.Table | bytes]] = {
    (REFUSED, REFUSED, REFUSED): {
        "no picture and no text": pa.table({"x": [1, 2, 3]}),
        "no rows": table([], []),
        "no columns": pa.table({}),
        "a column twice": pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["text", "text"]),
        "columns named nothing": pa.table({"": ["x"], "\n": ["y"]}),
        "every picture is missing": table([None] * 4),
        "pictures of no bytes": table([{"bytes": b"", "path": None}] * 4),
        "pictures that are none": table([{"bytes": b"garbage", "path": None}] * 4),
        "pictures without bytes or path": table([{"bytes": None, "path": None}] * 4),
        "pictures that are PostScript": table([{"bytes": PICTURES["unreadable"]["eps that would run a program"], "path": None}] * 4),
        "pictures that are pickles": table([{"bytes": pickle.dumps(Bomb()), "path": None}] * 4),
        "pictures that claim 400 megapixels": table([{"bytes": png_of(20_000, 20_000), "path": None}] * 4),
        "picture in a local file": named("/etc/passwd"),
        "picture in a local file that is one": named("HERE/secret.png"),
        "picture beside the data": named("../../x.png"),
        "picture at an address": named("http://127.0.0.1:9/x.png"),
        "picture at file://": named("file:///etc/passwd"),
        "picture in a zip elsewhere": named("zip://x.png::/etc/x.zip"),
        "picture in another repository": named("hf://datasets/x/y/z.png"),
        "picture in a file with a zero byte": named("a\0b"),
        "picture in memory of fsspec": named("memory://x.png"),
        "picture over ssh": named("ssh://127.0.0.1:9/x.png"),
        "numbers where pictures should be": table([3] * 4, image_type=pa.int64()),
        "texts where pictures should be": table(["x"] * 4, image_type=pa.string()),
        "schema metadata that is no json": table([HELD] * 4, about="{"),
        "schema metadata of an unknown feature": table([HELD] * 4, about=features(image={"_type": "Evil"})),
        "schema metadata of an unknown dtype": table([HELD] * 4, about=features(image=IMAGE, text=value("evil"))),
        "schema metadata nested deeply": table([HELD] * 4, about='{"info":' + "[" * 100_000 + "]" * 100_000 + "}"),
        "schema metadata of half a list": table([HELD] * 4, about=features(image=IMAGE, text={"_type": "Sequence"})),
        "schema metadata of numbers": table([HELD] * 4, about={"info": 3}),
        "features that are a number": table([HELD] * 4, about={"info": {"features": 3}}),
        "lists of pictures that are none": listed([{"bytes": b"x", "path": None}]),
        "lists of missing pictures": listed([None]),
        "lists of pictures in local files": listed([{"bytes": None, "path": "/etc/passwd"}]),
        "codes of numbers, no lists": coded([1] * 4, pa.int32()),
        "codes of text": coded([["x"] * 16] * 4, pa.list_(pa.string())),
        "codes of fractions": coded([[1.5] * 16] * 4, pa.list_(pa.float32())),
        "codes that are not numbers": coded([[float("nan")] * 16] * 4, pa.list_(pa.float32())),
        "codes of lists of lists of lists": coded([[[[1]]]] * 4, pa.list_(LISTS)),
        "codes beyond the codebook": coded([[10**6] * 16] * 4),
        "codes beyond 32 bits": coded([[2**40] * 16] * 4, pa.list_(pa.int64())),
        "codes below zero": coded([[-1] * 16] * 4),
        "codes just beyond the codebook": coded([[64] * 16] * 4),
        "too few codes": coded([[1] * 3] * 4),
        "too many codes": coded([[1] * 1000] * 4),
        "no codes": coded([[]] * 4),
        "codes that are missing": coded([[None] * 16] * 4),
        "codes of different lengths": coded([[1] * 16, [1] * 3] * 2),
        "lists of missing codes": coded([[None]] * 4, LISTS),
        "empty file": b"",
        "a text": b"hello",
        "magic alone": b"PAR1",
        "cut in half": GOOD_PARQUET[: len(GOOD_PARQUET) // 2],
        "the end alone": GOOD_PARQUET[-20:],
        "a footer of 2 GiB": GOOD_PARQUET[:-8] + struct.pack("<I", 2**31) + b"PAR1",
        "a footer of nothing": GOOD_PARQUET[:-8] + struct.pack("<I", 0) + b"PAR1",
        "encrypted": b"PARE" + GOOD_PARQUET[4:-4] + b"PARE",
        "zeros": b"PAR1" + bytes(1_000) + b"PAR1",
        "a pickle": pickle.dumps(Bomb()),
    },
    (HARMLESS, REFUSED, REFUSED): {
        "the last picture is none": table([HELD] * 3 + [{"bytes": b"garbage", "path": "cat.png"}]),
        "the last picture is cut": table([HELD] * 3 + [{"bytes": png()[:60], "path": "cat.png"}]),
        "the last picture is a bomb": table([HELD] * 3 + [{"bytes": png_of(20_000, 20_000), "path": None}]),
        "the last picture has no bytes": table([HELD] * 3 + [{"bytes": None, "path": None}]),
        "the last picture is in a local file": table([HELD] * 3 + [{"bytes": None, "path": "/etc/passwd"}]),
        "pictures of two sizes": table([HELD] * 2 + [{"bytes": png((32, 32)), "path": None}] * 2),
        "pictures of one pixel": table([{"bytes": png((1, 1)), "path": None}] * 4),
        "no schema metadata": table([HELD] * 4, about=None),
        "schema metadata that is a list": table([HELD] * 4, about="[]"),
        "schema metadata of other columns": table([HELD] * 4, about=features(nope=value("string"))),
        "schema metadata of other types": table([HELD] * 4, about=features(image=value("int64"), text=value("int64"))),
    },
    (REFUSED, HARMLESS, REFUSED): {
        "texts that are not utf-8": table([HELD] * 4, None, USUAL, text=bad_utf8()),
        "numbers where texts should be": table([HELD] * 4, [1] * 4, features(image=IMAGE, text=value("int64")), text_type=pa.int64()),
        "bytes where texts should be": table([HELD] * 4, [b"\xff"] * 4, features(image=IMAGE, text=value("binary")), text_type=pa.binary()),
    },
    (HARMLESS, REFUSED, HARMLESS): {"a picture is missing": table([None] + [HELD] * 3)},
    (HARMLESS, HARMLESS, REFUSED): {"no text": table([HELD] * 4, None, features(image=IMAGE))},
    (REFUSED, REFUSED, HARMLESS): {
        "codes alone": coded([[1] * 16] * 4),
        "every row of codes is missing": coded([None] * 4),
        "lists of pictures": listed([HELD]),
    },
    (HARMLESS, HARMLESS, HARMLESS): {
        "texts of control tokens": table([HELD] * 4, ["<|image_start|><|bos|><|image|>"] * 4),
        "every text is missing": table([HELD] * 4, [None] * 4),
        "texts of 128 kB": table([HELD] * 4, ["x " * 2**16] * 4),
        "texts of zero bytes": table([HELD] * 4, ["\0" * 9] * 4),
        "paths that climb out, with bytes": table([{"bytes": png(), "path": "../../../../etc/passwd"}] * 4),
        "metadata with unknown arguments": table([HELD] * 4, about=features(image=IMAGE | {"evil": 3}, text=value("string"))),
        "pictures of 16 bits": table([{"bytes": png(mode="I;16"), "path": None}] * 4),
    },
}  # fmt: skip


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def instead(name: str, other: str, content: str | bytes | dict) -> Callable[[Path], object]:
    content = json.dumps(content) if isinstance(content, dict) else content

    def make(folder: Path) -> None:
        (folder / name).unlink()
        put(other, content)(folder)

    return make


def merge(name: str, changes: dict, inside: str | None = None) -> Callable[[Path], object]:
    """Replaces values of a JSON file, or of an object in it."""

    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        if inside is None:
            content |= changes
        else:
            content[inside] |= changes
        (folder / name).write_text(json.dumps(content))

    return make


def tensors(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        weights = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        save_file(change(weights) or weights, folder / name, metadata={"format": "pt"})

    return make


def header(content: object, data: bytes = b"1234") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def pickled(name: str, other: str) -> Callable[[Path], object]:
    """A pickle that would write the marker, in place of the weights."""
    return instead(name, other, pickle.dumps({"x": Bomb()}))


def index(name: str, file: object) -> Callable[[Path], object]:
    """An index of shards that says that every tensor is in this file."""

    def make(folder: Path) -> None:
        weights = load_file(folder / name)
        (folder / name).rename(folder.parent / "outside.safetensors")
        (folder / "shard.bin").write_bytes(pickle.dumps({"x": Bomb()}))
        shown = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
        (folder / f"{name}.index.json").write_text(json.dumps(shown))

    return make


def raw_index(name: str, content: str) -> Callable[[Path], object]:
    return instead(name, f"{name}.index.json", content)


def weight_cases(name: str, one: str) -> dict[str, dict[str, Callable]]:
    """What can be wrong with the weights of any folder, of which `one` is a tensor."""
    return {
        REFUSED: {
            "weights that are not numbers": tensors(name, lambda w: w.update({one: w[one] * float("nan")})),
            "weights that are infinite": tensors(name, lambda w: w.update({one: w[one] + float("inf")})),
            "weights of another shape": tensors(name, lambda w: w.update({one: torch.zeros(3, 3)})),
            "weights of no rows": tensors(name, lambda w: w.update({one: torch.zeros(0, 8)})),
            "empty weights": put(name, b""),
            "weights of five bytes": put(name, b"12345"),
            "weights cut in half": edit(name, lambda data: data[: len(data) // 2]),
            "header of 2^62 bytes": edit(name, lambda data: struct.pack("<Q", 2**62) + data[8:]),
            "header of 200 MB": edit(name, lambda data: struct.pack("<Q", 200 * 2**20) + data[8:]),
            "header that is a list": put(name, header([1])),
            "header that is no json": put(name, header(b"hello")),
            "header that is not utf-8": put(name, header(b"\xff\xfe\xff\xff\xff")),
            "header nested deeply": put(name, header(DEEP.encode())),
            "tensors that overlap": put(name, header({"a": entry([1], [0, 4]), "b": entry([1], [0, 4])})),
            "tensor beyond the file": put(name, header({"a": entry([10**9], [0, 4 * 10**9])})),
            "tensor before the file": put(name, header({"a": entry([1], [-4, 0])})),
            "tensor of 2^80 elements": put(name, header({"a": entry([2**40, 2**40], [0, 4])})),
            "tensor of an unknown type": put(name, header({"a": entry([1], [0, 4], "X9")})),
            "pickle named safetensors": put(name, pickle.dumps(Bomb())),
            "no weights": without(name),
            "a folder in place of weights": lambda folder: ((folder / name).unlink(), (folder / name).mkdir()),
            "a link to nothing": lambda folder: ((folder / name).unlink(), (folder / name).symlink_to("/nonexistent")),
            "index that climbs out": index(name, "../outside.safetensors"),
            "index of an absolute path": index(name, "/etc/passwd"),
            "index of a pickle": index(name, "shard.bin"),
            "index of numbers": index(name, 3),
            "index of a file that is missing": index(name, "gone.safetensors"),
            "index that is a list": raw_index(name, "[]"),
            "index that is no json": raw_index(name, "{"),
            "index without a map": raw_index(name, "{}"),
            "index of nothing": raw_index(name, '{"metadata": {}, "weight_map": {}}'),
            "index nested deeply": raw_index(name, DEEP),
        },
        HARMLESS: {
            "more tensors than belong there": tensors(name, lambda w: w.update({"evil": torch.zeros(3)})),
            "weights of whole numbers": tensors(name, lambda w: w.update({one: w[one].long()})),
            "a pickle beside the weights": put("pytorch_model.bin", pickle.dumps(Bomb())),
            "a module beside the weights": put("evil.py", f"import os; open(os.environ['{MARKER}'], 'w')"),
        },
    }


VQ_WEIGHTS = "diffusion_pytorch_model.safetensors"


def vq(**changes) -> Callable[[Path], object]:
    return merge("config.json", changes)


JSON_FILES = {
    "is empty": "",
    "is no json": '{"a":',
    "is a list": "[]",
    "is null": "null",
    "is a text": '"x"',
    "is a number": "3",
    "is nested deeply": DEEP,
    "is not utf-8": b"\xff\xfe\x00",
    "is a number of 5,000 digits": '{"model_type": "unitok_hf", "text_vocab_size": ' + DIGITS + "}",
}

_vq = weight_cases(VQ_WEIGHTS, "quantize.embedding.weight")
TOKENIZERS = {
    REFUSED: _vq[REFUSED]
    | {f"config.json {what}": put("config.json", text) for what, text in JSON_FILES.items()}
    | {
        "no config.json": without("config.json"),
        "pickle in place of weights": pickled(VQ_WEIGHTS, "diffusion_pytorch_model.bin"),
        "a tensor is missing": tensors(VQ_WEIGHTS, lambda w: {k: t for k, t in w.items() if "quantize" not in k}),
        "every tensor is missing": tensors(VQ_WEIGHTS, lambda w: {"a": torch.zeros(1)}),
        "class name of a number": vq(_class_name=3),
        "widths of text": vq(block_out_channels="abc"),
        "widths of fractions": vq(block_out_channels=[32.5, 32, 32]),
        "widths below zero": vq(block_out_channels=[-32, 32, 32]),
        "widths of zero": vq(block_out_channels=[0, 0, 0]),
        "widths of null": vq(block_out_channels=None),
        "no widths": vq(block_out_channels=[]),
        "widths of 10^10": vq(block_out_channels=[32 * 10**9] * 3),
        "a million levels": vq(block_out_channels=[32] * 10**6),
        "widths that groups do not divide": vq(block_out_channels=[33, 33, 33]),
        "10^15 codes": vq(num_vq_embeddings=10**15),
        "2 billion codes": vq(num_vq_embeddings=2 * 10**9),
        "16 million codes, of 64 in the file": vq(num_vq_embeddings=2**24),
        "codes below zero": vq(num_vq_embeddings=-1),
        "no codes": vq(num_vq_embeddings=0),
        "codes of text": vq(num_vq_embeddings="x"),
        "codes of a fraction": vq(num_vq_embeddings=64.5),
        "other codes than in the file": vq(num_vq_embeddings=32),
        "channels of text": vq(in_channels="x"),
        "channels below zero": vq(in_channels=-3),
        "channels of 10^18": vq(in_channels=3 * 10**18, out_channels=3 * 10**18, patch_size=10**9),
        "channels of true": vq(in_channels=True),
        "unknown activation": vq(act_fn="x"),
        "activation of a number": vq(act_fn=3),
        "unknown norm": vq(norm_type="x"),
        "no groups": vq(norm_num_groups=0),
        "groups of text": vq(norm_num_groups="x"),
        "unknown blocks": vq(down_block_types=["Evil"] * 3),
        "blocks of numbers": vq(down_block_types=[1, 2, 3]),
        "layers below zero": vq(layers_per_block=-1),
        "a million layers": vq(layers_per_block=10**6),
        "layers of text": vq(layers_per_block="x"),
        "range that is turned": vq(pixel_range=[1, 0]),
        "range that is no number": vq(pixel_range=[0, float("nan")]),
        "range that is infinite": vq(pixel_range=[0, float("inf")]),
        "range of text": vq(pixel_range="ab"),
        "range of a number": vq(pixel_range=3),
        "patch of zero": vq(patch_size=0),
        "patch of text": vq(patch_size="x"),
        "patch of a fraction": vq(patch_size=4.0),
        "pictures of no size": vq(sample_size=0),
        "pictures of a text": vq(sample_size="x"),
        "pictures of 2^40": vq(sample_size=2**40),
        "latents of text": vq(latent_channels="x"),
        "latents of another width": vq(vq_embed_dim=9),
        "a key that names the class": merge("config.json", {"__class__": 3}),
        "unknown quantization": vq(quantization_config={"quant_method": "x"}),
        "quantization of a number": vq(quantization_config=3),
    },
    HARMLESS: _vq[HARMLESS]
    | {
        "unknown key": vq(evil=1),
        "class name of a program": vq(_class_name="os.system"),
        "class name of another model": vq(_class_name="UNet2DModel"),
        "a key that names a method": vq(encode=3),
        "code to be fetched": vq(auto_map={"AutoModel": "evil.Evil"}),
    },
}


def top(**changes) -> Callable[[Path], object]:
    return merge("config.json", changes)


def inner(**changes) -> Callable[[Path], object]:
    return merge("config.json", changes, "text_config")


def inner_vq(**changes) -> Callable[[Path], object]:
    return merge("config.json", changes, "vq_config")


CONFIGS = {
    REFUSED: {f"config.json {what}": put("config.json", text) for what, text in JSON_FILES.items()}
    | {
        "no config.json": without("config.json"),
        "sizes of text": top(text_vocab_size="384"),
        "sizes of true": top(text_vocab_size=True),
        "no text tokens": top(text_vocab_size=0),
        "fewer than no text tokens": top(text_vocab_size=-64),
        "no codes": top(num_visual_tokens=0),
        "codes that do not match": top(num_visual_tokens=128),
        "ids that collide": top(uncond_token_id=5),
        "ids outside": top(pad_token_id=10**9),
        "ids of lists": top(eos_token_id=[[1]]),
        "no ends": top(eos_token_id=[]),
        "grid of text": top(image_grid="44"),
        "grid of fractions": top(image_grid=[4.0, 4]),
        "grid that is no number": top(image_grid=[float("nan"), 4]),
        "grid of three": top(image_grid=[4, 4, 4]),
        "grid of lists": top(image_grid=[[4], [4]]),
        "grid of null": top(image_grid=None),
        "weights of text": top(text_loss_weight="x"),
        "tied by text": top(tie_word_embeddings="yes"),
        "text model of a list": top(text_config=[1]),
        "text model of a text": top(text_config="x"),
        "text model of a number": top(text_config=3),
        "unknown text model": inner(model_type="evil"),
        "text model that is a path": inner(model_type="../../etc"),
        "text model of a list type": inner(model_type=[3]),
        "text model of an object type": inner(model_type={}),
        "text model that is a model of ours": inner(model_type="unitok_hf"),
        "text model of 10^9 layers": inner(num_hidden_layers=10**9),
        "text model of text": inner(hidden_size="x"),
        "text model of a wrong epsilon": inner(rms_norm_eps="x"),
        "text model with a key that names a method": inner(to_dict=3),
        "text model with code of a kernel": inner(_attn_implementation="evil/kernel"),
        "rope of a number": inner(rope_parameters=3),
        "tokenizer of a list": top(vq_config=[1]),
        "tokenizer of a text": top(vq_config="x"),
        "type of another class": top(dtype="os.system"),
        "labels of a number": top(id2label=3),
        "labels of a list": top(id2label=[1]),
        "number of labels of text": top(num_labels="x"),
        "quantization of a number": top(quantization_config=3),
        "code of a kernel": top(_attn_implementation="evil/kernel"),
        "code of a kernel, under its other name": top(attn_implementation="evil/kernel"),
        "a key that names the class": merge("config.json", {"__class__": 1}),
        "a key that names a method": top(to_dict=1),
        "a key that names a check": top(validate_vocabulary=1),
        "a key that names a computed value": top(vocab_size=1),
        "a key that names the vocabulary": top(vocabulary=1),
        "layer types of a number": top(layer_types=3),
        "nested 500 deep": put("config.json", '{"text_config":' * 500 + "{}" + "}" * 500),
    },
    HARMLESS: {
        "unknown key": top(evil=1),
        "key of nothing": merge("config.json", {"": 1}),
        "code to be fetched": top(auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        "architecture of a program": top(architectures=["os.system"]),
        "path in the name": top(_name_or_path="../../etc/passwd"),
    },
}

WEIGHTS = "model.safetensors"
_model = weight_cases(WEIGHTS, "lm_head.weight")
MODELS = {
    REFUSED: _model[REFUSED]
    | {f"config.json {what}": put("config.json", text) for what, text in JSON_FILES.items()}
    | {
        "pickle in place of weights": pickled(WEIGHTS, "pytorch_model.bin"),
        "pickle of tensors in place of weights": lambda folder: (
            torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin"),
            (folder / WEIGHTS).unlink(),
        ),
        "no config.json": without("config.json"),
        "another kind of model": top(model_type="gpt2"),
        "kind of a number": top(model_type=3),
        "kind of a list": top(model_type=[3]),
        "type of whole numbers": top(dtype="int64"),
        "vocabulary of 10^13": top(text_vocab_size=64 * 10**12),
        "text model of no width": inner(hidden_size=0),
        "text model of 2^40": inner(hidden_size=2**40),
        "text model of no heads": inner(num_attention_heads=0),
        "text model of fewer than no heads": inner(num_attention_heads=-2),
        "text model below zero": inner(intermediate_size=-4),
        "text model of another activation": inner(hidden_act="x"),
        "text model that sees": inner(model_type="resnet"),
        "text model of an unknown rope": inner(rope_parameters={"rope_type": "evil", "rope_theta": 1}),
        "text model of 10^9 layers": inner(num_hidden_layers=10**9),
        "tokenizer of a million layers": inner_vq(layers_per_block=10**6),
        "tokenizer of an unknown argument": inner_vq(evil=1),
        "tokenizer of text": inner_vq(latent_channels="x"),
        "tokenizer of 10^10 channels": inner_vq(block_out_channels=[32 * 10**9] * 3),
        "generation_config.json is a list": put("generation_config.json", "[]"),
        "generation that names a method": merge("generation_config.json", {"to_dict": 3}),
    },
    HARMLESS: _model[HARMLESS]
    | {
        "code to be fetched": top(auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}),
        "architecture of a program": top(architectures=["os.system"]),
        "generation_config.json is no json": put("generation_config.json", "{"),
        "a custom_generate module": lambda folder: (
            (folder / "custom_generate").mkdir(),
            put("custom_generate/generate.py", f"import os; open(os.environ['{MARKER}'], 'w')")(folder),
        ),
    },
}

PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")


def tokenizer(**changes) -> Callable[[Path], object]:
    return merge("tokenizer_config.json", changes)


def backend(**changes) -> Callable[[Path], object]:
    return merge("tokenizer.json", changes)


PROCESSORS = {
    REFUSED: {
        f"{file} {what}": put(file, text)
        for file in PROCESSOR_FILES
        for what, text in JSON_FILES.items()
        if "digits" not in what
    }
    | {f"no {file}": without(file) for file in PROCESSOR_FILES}
    | {
        "codes of text": merge("processor_config.json", {"num_image_tokens": "x"}),
        "codes below zero": merge("processor_config.json", {"num_image_tokens": -1}),
        "10^12 codes": merge("processor_config.json", {"num_image_tokens": 10**12}),
        "processor of a number": merge("processor_config.json", {"processor_class": 3}),
        "image processor of null": merge("processor_config.json", {"image_processor": None}),
        "image processor of a number": merge("processor_config.json", {"image_processor": 3}),
        "unknown image processor": merge("processor_config.json", {"image_processor_type": "Evil"}, "image_processor"),
        "image size of text": merge("processor_config.json", {"size": "x"}, "image_processor"),
        "tokenizer class of a number": tokenizer(tokenizer_class=3),
        "begin of a number": tokenizer(bos_token=3),
        "no image token": tokenizer(image_token=None),
        "special tokens of a number": tokenizer(extra_special_tokens=3),
        "special tokens of numbers": tokenizer(extra_special_tokens={"a": 3}),
        "added tokens of numbers": tokenizer(added_tokens_decoder={"x": 3}),
        "padding to nowhere": tokenizer(padding_side="up"),
        "a key that names a method": tokenizer(encode=3),
        "unknown model": backend(model={"type": "Evil"}),
        "unknown version": backend(version="9"),
        "unknown normalizer": backend(normalizer={"type": "Evil"}),
        "pretokenizer of a number": backend(pre_tokenizer=3),
        "pattern that is none": backend(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated", "invert": False}
        ),
        "added token without content": backend(added_tokens=[{"id": 3}]),
        "added tokens of a number, in the backend": backend(added_tokens=3),
        "vocabulary below zero": backend(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        "chat template that is not utf-8": put("chat_template.jinja", b"\xff\xfe"),
    },
    HARMLESS: {
        "unknown key": merge("processor_config.json", {"evil": 1}),
        "code to be fetched": merge("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}}),
        "tokenizer code to be fetched": tokenizer(auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "tokenizer file elsewhere": tokenizer(tokenizer_file="/etc/passwd"),
        "chat template that is none": put("chat_template.jinja", "{{ evil"),
        "chat template that reaches for the system": put(
            "chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        ),
    },
}

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
)
ARGUMENTS = {
    REFUSED: {
        **{f"a.json {what}": ("a.json", text) for what, text in JSON_FILES.items()},
        "unknown key": ("a.json", '{"evil": 1}'),
        "a number for text": ("a.json", '{"data_path": 3}'),
        "text for a number": ("a.json", '{"image_size": "x"}'),
        "a key twice, by its alias": ("a.json", '{"batch_size": 1, "per_device_train_batch_size": 2}'),
        "yaml that makes objects": ("a.yaml", f"!!python/object/apply:eval [\"open('{MARKER}', 'w')\"]"),
        "yaml of a tab": ("a.yaml", "\t"),
        "yaml that is a list": ("a.yaml", "- a"),
        "yaml of laughs": ("a.yaml", LAUGHS),
        "yaml of laughs for a value": ("a.yaml", LAUGHS.replace("p:", "data_path:")),
        "yaml of a key that is a list": ("a.yaml", "? [a, b]\n: c\n"),
        "yaml nested deeply": ("a.yaml", "[" * 5_000),
        "another suffix": ("a.py", "import os"),
    }
}  # fmt: skip


def cases(*kinds: str) -> list[Case]:
    """The cases of these kinds, or all; of `table`, the outcome is that of prepare-data, and of the two trainings."""
    found: list[Case] = []
    for outcome, files in PICTURES.items():
        for name, content in files.items():
            found.append(
                Case("picture", name, outcome, lambda folder, content=content: write_picture(folder, content))
            )
    for kind, groups in (("listing", LISTINGS), ("tokenizer", TOKENIZERS), ("config", CONFIGS), ("model", MODELS),
                         ("processor", PROCESSORS)):  # fmt: skip
        found += [Case(kind, name, outcome, make) for outcome, files in groups.items() for name, make in files.items()]
    for outcome, files in ARCHIVES.items():
        found += [
            Case("archive", name, outcome, lambda file, content=content: file.write_bytes(content))
            for name, content in files.items()
        ]
    for outcomes, files in TABLES.items():
        for name, content in files.items():
            found.append(
                Case("table", name, ",".join(outcomes), lambda file, content=content: write_table(file, content))
            )
    for outcome, files in ARGUMENTS.items():
        for name, (file, text) in files.items():
            found.append(
                Case("arguments", name, outcome, lambda folder, file=file, text=text: written(folder / file, text))
            )
    return [case for case in found if not kinds or case.kind in kinds]


def write_table(file: Path, content: pa.Table | bytes) -> None:
    if isinstance(content, bytes):
        file.write_bytes(content)
        return
    if "image" in content.column_names and pa.types.is_struct(content["image"].type):
        secret = file.with_name("secret.png")
        rows = [
            row and row | {"path": row["path"] and row["path"].replace("HERE", str(file.parent))}
            for row in content["image"].to_pylist()
        ]
        if any(row and row["path"] == str(secret) for row in rows):
            secret.write_bytes(png())
            position = content.column_names.index("image")
            content = content.set_column(position, content.schema.field(position), pa.array(rows, PICTURE))
    pq.write_table(content, file)


def written(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


if __name__ == "__main__":
    counts = Counter(case.kind for case in cases())
    print("\n".join(f"{count:5}  {kind}" for kind, count in counts.items()), f"\n{sum(counts.values()):5}  in all")
