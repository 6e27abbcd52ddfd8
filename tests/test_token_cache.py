"""`encode` and training from its codes."""

import dataclasses
import os

import datasets
import pyarrow.parquet as pq
import pytest
import torch

from unitok_hf.training.collators import StreamCollator, StreamDataset, read_rows, to_pixels
from unitok_hf.training.gpt_trainer import GPTTrainingArguments, train_gpt
from unitok_hf.training.token_cache import EncodeArguments, encode, fingerprint


@pytest.fixture
def cache(parquet, vq_model, tmp_path):
    """Eight pictures as codes in three shards; returns the arguments and the shards."""
    vq_model.save_pretrained(tmp_path / "tokenizer")
    args = EncodeArguments(
        checkpoint=str(tmp_path / "tokenizer"),
        data_path=parquet,
        output_dir=str(tmp_path / "codes"),
        batch_size=2,
        rows_per_shard=3,
    )
    return args, encode(args)


def streams(rows, tokenizer):
    return StreamDataset(rows, tokenizer, 16, "text", 0.5, 0.1, 64, "none", seed=0)


def test_the_codes_are_those_of_the_tokenizer(cache, vq_model, pictures, captions):
    args, paths = cache
    assert [path.name for path in paths] == [f"codes-{n:05d}-of-00003.parquet" for n in range(3)]
    rows = read_rows(args.output_dir)
    expected = vq_model.encode_to_indices(torch.stack([to_pixels(picture) for picture in pictures]))
    assert rows["image_codes"][:] == expected.flatten(1).tolist()
    assert rows["text"][:] == captions
    assert "image" not in rows.column_names


def test_cached_batches_equal_those_encoded_on_the_fly(cache, parquet, model, vq_model, tokenizer):
    args, _ = cache
    model.model.vqmodel.load_state_dict(vq_model.state_dict())
    collate = StreamCollator(tokenizer)
    fly, cached = (
        collate([streams(read_rows(path), tokenizer)[i] for i in range(8)]) for path in (parquet, args.output_dir)
    )
    assert "pixel_values" not in cached
    with torch.no_grad():
        assert torch.equal(model(**fly).logits, model(**cached).logits)


@pytest.mark.parametrize("sizes", [[64, 64, 32, 64], [64, 64, 128, 128]], ids=["one", "a whole batch"])
def test_a_picture_of_another_size_is_refused_by_its_row(cache, pictures, tmp_path, sizes):
    args, _ = cache
    rows = {"image": [picture.resize((size, size)) for picture, size in zip(pictures, sizes, strict=False)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "sizes.parquet"))
    changed = dataclasses.replace(
        args, data_path=str(tmp_path / "sizes.parquet"), output_dir=str(tmp_path / "new"), rows_per_shard=2
    )
    with pytest.raises(ValueError, match=f"row 2 of the data: {sizes[2]}x{sizes[2]} pixels, not 64x64"):
        encode(changed)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["codes-00000-of-00002.parquet"]


def test_encoding_reads_a_row_group_at_a_time(pictures, vq_model, tmp_path, monkeypatch):
    rows = {"image": [pictures[row % 8] for row in range(40)], "text": [str(row) for row in range(40)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"), batch_size=8)
    vq_model.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(datasets, "load_dataset", None)  # which would make a copy
    read = []
    stock = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, number, columns, **k: read.append((number, *columns)) or stock(self, number, columns, **k),
    )
    paths = encode(
        EncodeArguments(
            checkpoint=str(tmp_path / "tokenizer"),
            data_path=str(tmp_path / "data.parquet"),
            output_dir=str(tmp_path / "codes"),
            batch_size=5,
            rows_per_shard=12,
        )
    )
    assert [text for path in paths for text in pq.read_table(path)["text"].to_pylist()] == rows["text"]
    pictures_read = [group for group, column in read[1:] if column == "image"]  # the first is looked at before
    assert pictures_read == [0, 1, 2, 3, 4]


def test_a_stopped_run_goes_on_with_the_missing_shards(cache):
    args, paths = cache
    os.remove(paths[1])
    before = [paths[number].stat().st_mtime_ns for number in (0, 2)]
    encode(args)
    assert paths[1].exists()
    assert [paths[number].stat().st_mtime_ns for number in (0, 2)] == before


def test_shards_of_data_that_has_changed_are_refused_and_another_path_to_it_is_not(cache, monkeypatch, tmp_path):
    args, paths = cache
    monkeypatch.chdir(tmp_path)
    assert encode(dataclasses.replace(args, data_path=os.path.relpath(args.data_path))) == paths
    rows = read_rows(args.data_path)
    rows.select(range(7, -1, -1)).to_parquet(str(tmp_path / "turned.parquet"))
    os.replace(tmp_path / "turned.parquet", args.data_path)
    with pytest.raises(ValueError, match="made by another tokenizer or of other data"):
        encode(args)


def test_shards_of_another_tokenizer_are_refused(cache, vq_model, tmp_path):
    args, _ = cache
    with torch.no_grad():
        vq_model.codebook.add_(1)
    vq_model.save_pretrained(args.checkpoint)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        encode(args)
    with pytest.raises(ValueError, match="codes of another image tokenizer"):
        train_gpt(training(args, tmp_path))


def test_a_better_decoder_leaves_the_cache_fresh(vq_model):
    before = fingerprint(vq_model)
    with torch.no_grad():
        vq_model.decoder.conv_out.bias += 1
    assert fingerprint(vq_model) == before


def test_augmentation_of_codes_is_refused(cache, tmp_path):
    args, _ = cache
    with pytest.raises(ValueError, match="--augment affine changes pictures"):
        train_gpt(training(args, tmp_path, augment="affine"))


def test_a_model_trains_from_codes(cache, tmp_path):
    args, _ = cache
    metrics = train_gpt(training(args, tmp_path))
    assert metrics["eval_image_bits"] > 0
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_shard_is_parquet_with_plain_lists(cache):
    _, paths = cache
    assert str(pq.read_schema(paths[0]).field("image_codes").type) == "list<element: int32>"


def training(args: EncodeArguments, tmp_path, **options) -> GPTTrainingArguments:
    return GPTTrainingArguments(
        data_path=args.output_dir,
        visual_tokenizer_path=args.checkpoint,
        output_dir=str(tmp_path / "model"),
        depth=1,
        max_steps=2,
        per_device_train_batch_size=4,
        validation_fraction=0.25,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
