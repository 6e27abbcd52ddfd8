"""From rows to batches: what the streams look like, and what their randomness depends on."""

import io
import re
from collections import Counter
from multiprocessing import get_all_start_methods
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from unitok_hf.processing.image_processing_unitok import UniTokImageProcessor
from unitok_hf.training.collators import (
    PictureCollator,
    PictureDataset,
    StreamCollator,
    StreamDataset,
    hold_out,
    read_rows,
    require_images,
    require_pictures,
    require_size,
    require_text,
    to_pixels,
    training_and_validation,
)
from unitok_hf.training.token_cache import EncodeArguments, encode


CODES = 4  # per image
FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


@pytest.fixture
def write(tmp_path):
    """Writes columns as a Parquet file and returns its path."""

    def write_file(columns: dict, features=FEATURES, name: str = "data.parquet") -> str:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / name))
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def streams(tokenizer, parquet):
    """Makes a StreamDataset of the eight pictures and captions, or of other rows."""

    def make(rows=None, **options) -> StreamDataset:
        settings = {
            "tokenizer": tokenizer,
            "codes_per_image": CODES,
            "text_column": "text",
            "image_first": 0.5,
            "caption_dropout": 0.0,
            "max_length": 64,
            "augment": "none",
            "seed": 0,
        }
        return StreamDataset(read_rows(parquet) if rows is None else rows, **settings | options)

    return make


@pytest.fixture
def spell(tokenizer):
    """Ids as text, placeholders counted: `<|bos|>a red circle<|image_start|>[4]<|image_end|><|eos|>`."""

    def as_text(ids) -> str:
        return tokenizer.decode(ids).replace("<|image|>" * CODES, f"[{CODES}]")

    return as_text


def test_the_three_kinds_of_streams(streams, spell):
    [image_first] = {spell(streams(image_first=1.0)[0]["input_ids"])}
    [text_first] = {spell(streams(image_first=0.0)[0]["input_ids"])}
    [uncond] = {spell(streams(image_first=0.0, caption_dropout=1.0)[0]["input_ids"])}
    assert image_first == "<|bos|><|image_start|>[4]<|image_end|>a red circle<|eos|>"
    assert text_first == "<|bos|>a red circle<|image_start|>[4]<|image_end|><|eos|>"
    assert uncond == "<|bos|><|uncond|><|image_start|>[4]<|image_end|><|eos|>"


def test_streams_are_what_the_processor_asks_at_inference(streams, processor, pictures, tokenizer):
    drawn = processor(text="a red circle", generation_mode="image")["input_ids"]
    drawn = drawn if isinstance(drawn[0], int) else drawn[0]
    text_first = streams(image_first=0.0, codes_per_image=16)[0]["input_ids"]
    assert text_first[: len(drawn)] == list(drawn)
    asked = processor(images=pictures[0], text="")["input_ids"]
    asked = asked if isinstance(asked[0], int) else asked[0]
    image_first = streams(image_first=1.0, codes_per_image=16)[0]["input_ids"]
    assert image_first[: len(asked)] == list(asked)


def test_pixels_are_those_of_the_image_processor(pictures):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for picture in (pictures[0], noise):
        expected = UniTokImageProcessor()(picture, return_tensors="pt").pixel_values[0]
        assert torch.allclose(to_pixels(picture), expected, rtol=0, atol=1e-6)
        assert to_pixels(picture).abs().max() <= 1


def test_shares_of_orders_and_of_dropped_captions(streams, tokenizer):
    data = streams(image_first=0.3, caption_dropout=0.2)
    kinds = Counter()
    for data.epoch in range(250):
        for index in range(8):
            second = data[index]["input_ids"][1]
            kinds[second if second in (tokenizer.image_start_token_id, tokenizer.uncond_token_id) else "text"] += 1
    shares = {kind: count / 2000 for kind, count in kinds.items()}
    # three standard deviations of 2,000 draws
    assert shares[tokenizer.image_start_token_id] == pytest.approx(0.3, abs=0.031)
    assert shares[tokenizer.uncond_token_id] == pytest.approx(0.7 * 0.2, abs=0.024)


def test_text_alone_and_pictures_alone_and_neither(streams, spell, write, pictures):
    columns = {"image": [None, pictures[0], pictures[1], None], "text": ["a red circle", None, "", None]}
    rows = read_rows(write(columns))
    for image_first in (0.0, 1.0):
        data = streams(rows, image_first=image_first, caption_dropout=1.0)
        assert spell(data[0]["input_ids"]) == "<|bos|>a red circle<|eos|>"
        assert data[0]["pixel_values"] is None
        for index in (1, 2):
            middle = "<|image_start|>[4]<|image_end|>"
            expected = f"<|bos|>{middle}<|eos|>" if image_first else f"<|bos|><|uncond|>{middle}<|eos|>"
            assert spell(data[index]["input_ids"]) == expected
            assert data[index]["pixel_values"].shape == (3, 64, 64)
        with pytest.raises(ValueError, match="row 3 .* neither a picture nor a text"):
            data[3]


@pytest.mark.parametrize("image_first", [0.0, 1.0])
@pytest.mark.parametrize("max_length", [CODES + 5, CODES + 9])
def test_long_texts_lose_their_end_and_images_lose_nothing(
    streams, spell, write, tokenizer, pictures, image_first, max_length
):
    text = "a green square " * 30
    words = tokenizer(text, add_special_tokens=False).input_ids
    rows = read_rows(write({"image": [pictures[0], None], "text": [text, text]}))
    data = streams(rows, image_first=image_first, max_length=max_length)
    kept = tokenizer.decode(words[: max_length - CODES - 4])
    image = "<|image_start|>[4]<|image_end|>"
    middle = image + kept if image_first else kept + image
    assert spell(data[0]["input_ids"]) == f"<|bos|>{middle}<|eos|>"
    assert spell(data[1]["input_ids"]) == f"<|bos|>{tokenizer.decode(words[: max_length - 2])}<|eos|>"
    assert [len(data[index]["input_ids"]) for index in (0, 1)] == [max_length, max_length]


def test_a_stream_too_short_for_an_image_is_refused(streams):
    streams(max_length=CODES + 5)
    with pytest.raises(ValueError, match="an image takes 9 tokens, more than the 8 of a stream"):
        streams(max_length=CODES + 4)


def test_control_tokens_in_a_caption_are_plain_text(streams, write, tokenizer, pictures):
    text = "<|image|> <|eos|> and <|image_start|><|uncond|><|pad|> end"
    ids = streams(read_rows(write({"image": [pictures[0]], "text": [text]})), image_first=0.0, max_length=256)[0][
        "input_ids"
    ]
    start = ids.index(tokenizer.image_start_token_id)
    assert tokenizer.decode(ids[1:start]) == text
    assert not set(ids[1:start]) & set(tokenizer.all_special_ids)
    special = [token for token in ids if token in tokenizer.all_special_ids]
    image = [tokenizer.image_start_token_id, *[tokenizer.image_token_id] * CODES, tokenizer.image_end_token_id]
    assert special == [tokenizer.bos_token_id, *image, tokenizer.eos_token_id]


def test_a_batch_is_padded_on_the_right_and_labelled_where_something_is_to_be_predicted(streams, tokenizer):
    samples = [
        streams(image_first=1.0)[0],
        streams(image_first=0.0, caption_dropout=1.0)[1],
        {"input_ids": [tokenizer.bos_token_id, 50, tokenizer.eos_token_id], "pixel_values": None},
    ]
    batch = StreamCollator(tokenizer)(samples)
    length = max(len(sample["input_ids"]) for sample in samples)
    for row, sample in enumerate(samples):
        ids = sample["input_ids"]
        missing = length - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [tokenizer.pad_token_id] * missing
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * missing
        labels = [-100 if token == tokenizer.uncond_token_id else token for token in ids]
        assert batch["labels"][row].tolist() == labels + [-100] * missing
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum() + 1
    assert torch.equal(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in samples[:2]]))


def test_a_batch_of_text_alone_has_no_pixels(tokenizer):
    batch = StreamCollator(tokenizer)([{"input_ids": [1, 50, 2], "pixel_values": None}] * 2)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]


def random_things(data: StreamDataset) -> list[tuple[list[int], torch.Tensor]]:
    return [(data[index]["input_ids"], data[index]["pixel_values"]) for index in range(len(data))]


def same(first: list, second: list) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def test_randomness_is_decided_by_seed_epoch_and_index_alone(streams):
    data = streams(augment="affine", caption_dropout=0.5)
    first = random_things(data)
    torch.manual_seed(1)
    np.random.seed(1)
    assert same(random_things(data), first)  # asked again, whatever the global generators
    backwards = [(data[index]["input_ids"], data[index]["pixel_values"]) for index in reversed(range(8))]
    assert same(backwards[::-1], first)
    data.epoch = 1
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(random_things(data), first, strict=True))
    data.epoch = 0
    assert same(random_things(data), first)
    other = random_things(streams(augment="affine", caption_dropout=0.5, seed=1))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(other, first, strict=True))
    twice = PictureDataset(data.rows.select([0, 0]), "affine", 0)
    assert not torch.equal(twice[0], twice[1])


@pytest.mark.parametrize("method", [method for method in ("fork", "spawn") if method in get_all_start_methods()])
def test_workers_draw_the_same_in_every_epoch(streams, tokenizer, method):
    data = streams(augment="affine", caption_dropout=0.5)
    workers = DataLoader(
        data,
        batch_size=4,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=True,
        collate_fn=StreamCollator(tokenizer),
    )
    here = DataLoader(data, batch_size=4, collate_fn=StreamCollator(tokenizer))
    seen = []
    for data.epoch in (0, 1):
        for batch, expected in zip(workers, here, strict=True):
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in batch)
            seen.append(batch["pixel_values"])
    assert not torch.equal(seen[0], seen[2])


def test_without_augmentation_pixels_are_the_pictures(parquet, pictures):
    batch = PictureCollator()([PictureDataset(read_rows(parquet), "none", 0)[index] for index in range(8)])
    assert torch.equal(batch["pixel_values"], torch.stack([to_pixels(picture) for picture in pictures]))


def test_augmentation_moves_a_little(parquet):
    data = PictureDataset(read_rows(parquet), "affine", 0)
    plain = PictureDataset(data.rows, "none", 0)
    for index in range(8):
        moved = data[index]
        assert moved.shape == (3, 64, 64) and moved.abs().max() <= 1
        assert 0 < (moved - plain[index]).abs().mean() < 0.6
        assert torch.equal(moved[:, 32, 32], plain[index][:, 32, 32])  # the middle of a big shape stays what it is
        assert (moved[:, 0, :] == 1).float().mean() > 0.8  # white moves in from the white border


def test_held_out_rows_are_others_and_none_is_lost(parquet):
    rows = read_rows(parquet)
    for fraction, held in ((0.01, 1), (0.25, 2), (0.99, 7)):
        train, test = hold_out(rows, fraction, seed=0)
        assert len(test) == held
        assert sorted([*train["text"], *test["text"]]) == sorted(rows["text"])
    again = hold_out(rows, 0.25, seed=0)[1]["text"][:]
    assert again == hold_out(rows, 0.25, seed=0)[1]["text"][:]
    assert len({tuple(hold_out(rows, 0.25, seed=seed)[1]["text"][:]) for seed in range(5)}) > 1
    with pytest.raises(ValueError, match="1 row cannot be split"):
        hold_out(rows.select([0]), 0.5, seed=0)


def test_validation_rows_of_their_own_file(parquet, write, pictures):
    other = write({"image": pictures[:1], "text": ["x"]})
    rows, eval_rows = training_and_validation(parquet, other, 0.5, 0, streaming=False)
    assert (len(rows), eval_rows["text"][:]) == (8, ["x"])


def test_a_file_a_folder_and_a_pattern(write, pictures, tmp_path):
    for name in ("b.parquet", "a.parquet"):
        write({"image": pictures[:2], "text": [name, name]}, name=name)
    (tmp_path / "notes.txt").write_text("not data")
    assert read_rows(str(tmp_path / "b.parquet"))["text"][:] == ["b.parquet"] * 2
    for path in (tmp_path, tmp_path / "*.parquet"):
        assert read_rows(str(path))["text"][:] == ["a.parquet"] * 2 + ["b.parquet"] * 2


def test_data_that_is_not_there_is_named(tmp_path):
    for name in ("none.parquet", "", "*.parquet"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"no Parquet data at {tmp_path / name};")):
            read_rows(str(tmp_path / name))


def test_data_that_cannot_be_read_is_refused_with_the_reason(write, pictures, tmp_path):
    with pytest.raises(ValueError, match="empty.parquet has no rows"):
        read_rows(write({"image": [], "text": []}, name="empty.parquet"))
    whole = Path(write({"image": pictures[:1], "text": ["x"]}))
    (tmp_path / "half.parquet").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="half.parquet is no Parquet file"):
        read_rows(str(tmp_path / "half.parquet"))
    write({"other": ["x"]}, datasets.Features({"other": datasets.Value("string")}), name="database.parquet")
    with pytest.raises(ValueError, match=r"(?s)data\*.parquet cannot be read: .*other"):
        read_rows(str(tmp_path / "data*.parquet"))


def test_data_that_does_not_fit_is_refused_with_what_it_is(write, pictures):
    rows = read_rows(write({"image": [None, pictures[0]], "text": ["x", "y"]}))
    require_size(rows, 64)
    require_text(rows, "text")
    with pytest.raises(ValueError, match="64x64 pixels, not 32x32; .* --image_size 32"):
        require_size(rows, 32)
    with pytest.raises(ValueError, match="no column 'caption', only image, text"):
        require_text(rows, "caption")
    with pytest.raises(ValueError, match="'image' holds no text"):
        require_text(rows, "image")
    with pytest.raises(ValueError, match="1 rows of the data have no picture"):
        require_pictures(rows)
    with pytest.raises(ValueError, match="no column 'image' of pictures, only text"):
        require_size(rows.remove_columns("image"), 64)
    with pytest.raises(ValueError, match="no row of the data has a picture"):
        require_size(rows.select([0]), 64)
    size = (64, 32)
    wide = read_rows(write({"image": [pictures[0].resize(size)], "text": ["x"]}, name="wide.parquet"))
    with pytest.raises(ValueError, match="64x32 pixels, not 64x64"):
        require_size(wide, 64)


def test_pictures_may_be_stored_as_bytes_of_any_format(write, pictures):
    file = io.BytesIO()
    pictures[0].convert("L").save(file, "JPEG")
    rows = read_rows(write({"image": [{"bytes": file.getvalue(), "path": None}], "text": ["x"]}))
    assert PictureDataset(rows, "none", 0)[0].shape == (3, 64, 64)


@pytest.fixture
def several(pictures, tmp_path) -> str:
    """Parquet of rows with lists of pictures: placed by the text, before it, one, none."""
    rows = {
        "images": [pictures[:2], pictures[2:5], pictures[5:6], []],
        "text": ["first <|image|> and <|image|> then <|eos|>", "a red", "<|image|>", "a"],
    }
    kinds = {"images": datasets.List(datasets.Image()), "text": datasets.Value("string")}
    path = tmp_path / "several.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(str(path))
    return str(path)


def test_several_images_stand_where_the_text_says_so(several, tokenizer, vq_model, model, pictures, tmp_path):
    """On the fly and from the cache: the same streams, the same codes."""
    options = ("text", 0.5, 0.5, 120, "none", 0)
    data = StreamDataset(read_rows(several), tokenizer, 16, *options)
    spell = [
        tokenizer.decode(sample["input_ids"]).replace("<|image|>" * 16, "[]")
        for sample in data.__getitems__([0, 1, 2, 3])
    ]
    image = "<|image_start|>[]<|image_end|>"
    assert spell == [
        f"<|bos|>first {image} and {image} then <|eos|><|eos|>",
        f"<|bos|>{image * 3}a red<|eos|>",
        f"<|bos|>{image}<|eos|>",
        "<|bos|>a<|eos|>",
    ]
    eos = [sample["input_ids"].count(tokenizer.eos_token_id) for sample in data.__getitems__([0, 1, 2, 3])]
    assert eos == [1] * 4  # the one that was typed is text
    assert data.lengths().tolist() == [len(data[row]["input_ids"]) for row in range(4)]
    batch = StreamCollator(tokenizer)([data[row] for row in range(4)])
    assert torch.equal(batch["pixel_values"], torch.stack([to_pixels(picture) for picture in pictures[:6]]))
    vq_model.save_pretrained(tmp_path / "tokenizer")
    encode(EncodeArguments(str(tmp_path / "tokenizer"), several, str(tmp_path / "codes"), batch_size=3))
    cached = StreamDataset(read_rows(str(tmp_path / "codes")), tokenizer, 16, *options)
    assert cached.lengths().tolist() == data.lengths().tolist()
    codes = StreamCollator(tokenizer)([cached[row] for row in range(4)])
    assert torch.equal(codes["input_ids"], batch["input_ids"])
    assert torch.equal(codes["image_codes"], vq_model.encode_to_indices(batch["pixel_values"]).flatten(1))
    model.model.vqmodel.load_state_dict(vq_model.state_dict())
    assert torch.equal(model(**batch).loss, model(**codes).loss)


def test_images_that_the_text_does_not_place_or_that_do_not_fit_are_refused(several, tokenizer):
    rows = read_rows(several)
    wrong = rows.map(lambda row: {"text": "<|image|> only"})
    with pytest.raises(ValueError, match=r"row 0 of the data has 1 <\|image\|> in its text, but 2 images"):
        StreamDataset(wrong, tokenizer, 16, "text", 0.5, 0.0, 120, "none", 0)[0]
    with pytest.raises(ValueError, match="row 1 of the data takes 56 tokens up to its last image, more than the 40"):
        StreamDataset(rows, tokenizer, 16, "text", 0.5, 0.0, 40, "none", 0)[1]


def test_lists_of_codes_alone_are_no_pictures():
    rows = datasets.Dataset.from_dict({"image_codes": [[[1] * 16]], "text": ["a"]})
    with pytest.raises(ValueError, match="the data has no column 'image' of pictures, only image_codes, text"):
        require_images(rows)
