"""`unitok-hf generate` and `unitok-hf evaluate`, end to end on tiny models: what they write, print and refuse."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import unitok_hf_cli as cli
from unitok_hf.processing.image_processing_unitok import to_pictures
from unitok_hf.training.collators import StreamCollator, StreamDataset, read_rows
from unitok_hf.training.evaluation import EvaluateArguments, evaluate


@pytest.fixture
def checkpoint(tmp_path, model, processor) -> str:
    """The folder of an untrained model."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def image_tokenizer(tmp_path, vq_model) -> str:
    """The folder of an untrained image tokenizer."""
    vq_model.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def picture_file(tmp_path, pictures) -> str:
    """A picture of another size and format than the model's."""
    pictures[0].resize((100, 80)).save(tmp_path / "circle.webp")
    return str(tmp_path / "circle.webp")


@pytest.fixture
def generate(checkpoint, tmp_path):
    """Runs `unitok-hf generate` on the model; returns the newest folder in its output."""

    def run(*argv: str) -> Path:
        out = tmp_path / "out"
        cli.main(["generate", "--checkpoint", checkpoint, "--output_dir", str(out), *argv])
        return sorted(out.iterdir())[-1]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompts_become_pictures(generate, model, capsys):
    folder = generate("--prompt", "a red circle", "ein grünes Quadrat", "--num_images", "5", "--seed", "3")
    assert capsys.readouterr().out.endswith(f"10 samples in {folder}\n")
    names = [f"{number:03d}.png" for number in range(10)]
    assert sorted(contents(folder)) == [*names, "samples.jsonl", "sheet.png", "text.txt"]
    written = samples(folder)
    assert [sample["prompt"] for sample in written] == ["a red circle"] * 5 + ["ein grünes Quadrat"] * 5
    assert [sample["images"] for sample in written] == [[name] for name in names]
    assert [(sample["seed"], sample["text"]) for sample in written] == [(3 + number, "") for number in range(10)]
    assert [sample["sample"] for sample in written] == list(range(10))
    ids = torch.tensor([sample["token_ids"] for sample in written])
    assert len(ids.unique(dim=0)) == 10
    sheet = Image.open(folder / "sheet.png")
    assert sheet.size == (8 * 64, 2 * 64)
    for number, picture in enumerate(to_pictures(model.decode_image_tokens(ids))):
        assert Image.open(folder / names[number]).tobytes() == picture.tobytes()
        left, top = 64 * (number % 8), 64 * (number // 8)
        assert sheet.crop((left, top, left + 64, top + 64)).tobytes() == picture.tobytes()
    assert sheet.crop((128, 64, 512, 128)).getextrema() == ((255, 255),) * 3
    text = (folder / "text.txt").read_text(encoding="utf-8").splitlines()
    assert (text[0], text[9]) == ("[0] a red circle", "[9] ein grünes Quadrat")


def test_no_run_overwrites_another_and_the_seed_decides(generate):
    prompt = ("--prompt", "a red circle", "--num_images", "2")
    first = generate(*prompt)
    before = contents(first)
    again, other = generate(*prompt), generate(*prompt, "--seed", "1")
    assert [folder.name for folder in (first, again, other)] == ["001", "002", "003"]
    assert contents(first) == contents(again) == before
    assert contents(other)["000.png"] != before["000.png"]


def test_a_sample_comes_again_alone_by_its_seed(generate):
    many = samples(generate("--prompt", "a red circle", "a blue square", "--num_images", "3", "--batch_size", "4"))
    for one in (many[1], many[4]):
        alone = samples(generate("--prompt", one["prompt"], "--seed", str(one["seed"])))
        assert [(sample["seed"], sample["token_ids"]) for sample in alone] == [(one["seed"], one["token_ids"])]


def test_guidance_temperature_and_top_k_reach_the_model(generate, model, processor):
    prompt = ("--prompt", "a red circle", "--num_images", "3")
    greedy = [sample["token_ids"] for sample in samples(generate(*prompt, "--temperature", "0"))]
    inputs = processor(text=["a red circle"], generation_mode="image", return_tensors="pt")
    for scale in (None, 3.0, 1.0):
        flags = () if scale is None else ("--guidance_scale", str(scale))
        expected = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=scale or 3.0)
        assert [sample["token_ids"] for sample in samples(generate(*prompt, "--temperature", "0", *flags))] == (
            expected.tolist() * 3
        )
    assert [sample["token_ids"] for sample in samples(generate(*prompt, "--top_k", "1"))] == greedy
    assert [sample["token_ids"] for sample in samples(generate(*prompt))] != greedy


def test_batches_cover_every_prompt(generate):
    folder = generate("--prompt", "a red circle", "a blue square", "--num_images", "3", "--batch_size", "4")
    assert [sample["prompt"] for sample in samples(folder)] == ["a red circle"] * 3 + ["a blue square"] * 3
    assert len(list(folder.glob("0*.png"))) == 6


def test_a_picture_becomes_text(generate, model, processor, picture_file):
    flags = ("--image", picture_file, "--generation_mode", "text", "--max_tokens", "7")
    folder = generate(*flags, "--temperature", "0", "--num_images", "2")
    inputs = processor(images=Image.open(picture_file), text="", return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="text", max_new_tokens=7, do_sample=False)
    generated = ids[0, inputs["input_ids"].shape[1] :].tolist()
    text = processor.tokenizer.decode(generated, skip_special_tokens=True).strip()
    written = samples(folder)
    assert [sample["token_ids"] for sample in written] == [generated] * 2
    assert [sample["text"] for sample in written] == [text] * 2
    assert [sample["images"] for sample in written] == [[], []]
    assert sorted(contents(folder)) == ["samples.jsonl", "text.txt"]


def test_text_and_pictures_in_one_stream(generate, model, picture_file):
    flags = ("--image", picture_file, "--prompt", "and then", "--generation_mode", "interleaved")
    folder = generate(*flags, "--num_images", "3", "--max_tokens", "40")
    written = samples(folder)
    assert [sample["prompt"] for sample in written] == ["and then"] * 3
    drawn = [name for sample in written for name in sample["images"]]
    assert len(drawn) >= 3
    assert sorted({*drawn, "samples.jsonl", "sheet.png", "text.txt"}) == sorted(contents(folder))
    for sample in written:
        ids = torch.tensor(sample["token_ids"])
        found = model.decode_mixed_tokens(ids, on_error="raise")[0]
        assert [segment.type for segment in found].count("image") == len(sample["images"])
    default = generate("--image", picture_file)  # what the model likes
    assert len(samples(default)) == 1


def refusal(capsys, *argv: str) -> str:
    """The one line with which a command ends that cannot do what it is asked."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(argv))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith(f"unitok-hf {argv[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x", "--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--prompt", "x", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        ([], "pass --prompt, --image, or both"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "README.md"], "not an image"),
        (["--prompt", "x", "--num_images", "0"], "--num_images must be at least 1, got 0"),
        (["--prompt", "x", "--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must not be negative, got -1"),
        (["--prompt", "x", "--guidance_scale", "-1"], "guidance_scale must be"),
        (["--prompt", "x", "--max_tokens", "15"], "needs 16 more tokens, but only 15"),
        (["--prompt", "x <|image|>"], "<|image|>"),
        (["--prompt", "x", "--generation_mode", "video"], "--generation_mode: expected one of auto, text, image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_generated_is_one_line(checkpoint, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    out = tmp_path / "out"
    assert message in refusal(capsys, "generate", "--checkpoint", checkpoint, "--output_dir", str(out), *flags)
    assert not list(out.rglob("*"))


def test_what_is_no_model_is_one_line(tmp_path, capsys, image_tokenizer, parquet):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (str(tmp_path / "none"), f"no model at {tmp_path / 'none'}"),
        ("out/none", "no model at out/none"),
        ("none", "no model at none"),
        (str(tmp_path / "empty"), "holds no UniTok model, but nothing we know"),
        (image_tokenizer, f"{image_tokenizer} holds no UniTok model, but VQModel"),
    ):
        assert message in refusal(capsys, "generate", "--checkpoint", path, "--prompt", "x")
    for path in (tmp_path / "none", tmp_path / "empty"):
        line = refusal(capsys, "evaluate", "--checkpoint", str(path), "--data_path", parquet)
        assert f"no tokenizer or model at {path}" in line
    (tmp_path / "empty/config.json").write_text('{"model_type": "gpt2"}')
    line = refusal(capsys, "evaluate", "--checkpoint", str(tmp_path / "empty"), "--data_path", parquet)
    assert "holds no UniTok model, but gpt2" in line


@torch.no_grad()
def test_a_model_is_measured_in_bits_per_token(checkpoint, model, tokenizer, parquet):
    found = evaluate(EvaluateArguments(checkpoint=checkpoint, data_path=parquet, batch_size=3, seed=5))
    streams = StreamDataset(read_rows(parquet), tokenizer, 16, "text", 0.5, 0.0, 2048, "none", 5)
    bits = {"text": [], "image": []}
    orders = set()
    for index in range(8):
        sample = streams[index]
        orders.add(sample["input_ids"][1] == tokenizer.image_start_token_id)
        ids = torch.tensor(sample["input_ids"])
        ids[ids == tokenizer.image_token_id] = model.get_image_tokens(sample["pixel_values"][None])[0]
        chances = model(ids[None]).logits[0, :-1].double().log_softmax(dim=-1)
        for position, token in enumerate(ids[1:].tolist()):
            kind = "image" if token >= model.vocabulary.offset else "text"
            bits[kind].append(-chances[position, token].item() / math.log(2))
    assert orders == {True, False}
    assert len(bits["image"]) == 8 * 16
    assert found["text_bits"] == pytest.approx(sum(bits["text"]) / len(bits["text"]), abs=1e-4)
    assert found["image_bits"] == pytest.approx(sum(bits["image"]) / len(bits["image"]), abs=1e-4)
    together = bits["text"] + bits["image"]
    assert found["loss"] == pytest.approx(math.log(2) * sum(together) / len(together), abs=1e-4)
    batch = StreamCollator(tokenizer)([streams[index] for index in range(8)])
    assert found["loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-4)


def test_measures_are_not_written_over(image_tokenizer, checkpoint, parquet, tmp_path, capsys):
    file = tmp_path / "measures.json"
    file.write_text("mine")
    for path in (image_tokenizer, checkpoint):
        flags = ["--checkpoint", path, "--data_path", parquet, "--output_file", str(file)]
        assert f"{file} exists" in refusal(capsys, "evaluate", *flags)
    assert file.read_text() == "mine"


def test_data_that_does_not_fit_is_one_line(image_tokenizer, checkpoint, parquet, tmp_path, capsys):
    for path in (image_tokenizer, checkpoint):
        line = refusal(capsys, "evaluate", "--checkpoint", path, "--data_path", str(tmp_path / "none.parquet"))
        assert "no Parquet data at" in line
    flags = ["--checkpoint", checkpoint, "--data_path", parquet, "--text_column", "caption"]
    assert "no column 'caption', only image, text" in refusal(capsys, "evaluate", *flags)
