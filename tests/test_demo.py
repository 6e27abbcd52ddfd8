"""`unitok-hf demo`: that it ends with what it promises, and, in the slow test, that it is as good as it promises."""

import json
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from nbclient import NotebookClient
from PIL import Image
from transformers import AutoModel

import unitok_hf_cli as cli
from unitok_hf import UniTokForConditionalGeneration, UniTokVQModel
from unitok_hf.training.collators import read_rows, to_pixels
from unitok_hf.training.demo import DemoArguments, Judge, demo


ROOT = Path(__file__).resolve().parent.parent
SHARES = {
    "codebook_usage",
    "classifier_accuracy_real",
    "classifier_accuracy_reconstructed",
    "digit_accuracy",
    "caption_accuracy",
}
STAGES = {"prepare data", "train tokenizer", "train model", "draw and caption", "judge"}


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """What a demo of a few steps leaves; a folder of an earlier run was in its place."""
    out = tmp_path_factory.mktemp("demo") / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    flags = ["--output_dir", str(out), "--tokenizer_steps", "3", "--steps", "3", "--drawings", "2"]
    cli.main(["demo", *flags])
    return out


def test_the_demo_leaves_data_models_report_and_metrics(short):
    left = {entry.name for entry in short.iterdir()}
    assert left == {"digits-train.parquet", "digits-test.parquet", "tokenizer", "model", "report.png", "metrics.json"}
    metrics = json.loads((short / "metrics.json").read_text())
    assert set(metrics) == SHARES | {"psnr", "ssim", "ms_ssim", "codebook_perplexity", "seconds", "commit"}
    assert all(0 <= metrics[name] <= 1 for name in SHARES)
    assert set(metrics["seconds"]) == STAGES and all(value >= 0 for value in metrics["seconds"].values())
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert metrics["commit"] == (asked.stdout.strip() or None)
    report = Image.open(short / "report.png")
    assert report.width == 1200 and len(report.getcolors(maxcolors=2**24)) > 100
    model = AutoModel.from_pretrained(short / "model")
    tokenizer = UniTokVQModel.from_pretrained(short / "tokenizer")
    assert type(model) is UniTokForConditionalGeneration
    assert model.vocabulary.grid == tokenizer.grid(32, 32) == (4, 4)
    assert torch.equal(model.model.vqmodel.codebook, tokenizer.codebook)


def test_both_models_have_a_card_of_what_was_measured(short):
    metrics = json.loads((short / "metrics.json").read_text())
    for name, measures in (("tokenizer", {"psnr", "codebook_usage"}), ("model", {"digit_accuracy", "image_bits"})):
        card = ModelCard.load(short / name / "README.md")
        found = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert measures <= set(found)
        assert all(found[measure] == metrics[measure] for measure in measures & set(metrics))
        assert f'from_pretrained("{short / name}")' in card.text
    widget = card.data.widget
    assert [entry["text"] for entry in widget] and all(
        (short / "model" / e["output"]["url"]).is_file() for e in widget
    )


def test_an_earlier_demo_is_kept(short):
    kept = short.with_name("out-001")
    assert [entry.name for entry in kept.iterdir()] == ["precious.txt"]


def test_the_judge_knows_real_digits_and_was_fitted_to_others(short):
    train, test = read_rows(str(short / "digits-train.parquet")), read_rows(str(short / "digits-test.parquet"))
    assert (len(train), len(test)) == (1400, 397)
    pixels = [torch.stack([to_pixels(picture) for picture in rows["image"]]) for rows in (train, test)]
    digits = [np.array(rows["label"]) for rows in (train, test)]
    assert set(test["text"]) == {f"a handwritten {name}" for name in test.features["label"].names}
    judge = Judge(pixels[0], digits[0])
    accuracy = judge.accuracy(pixels[1], digits[1])
    assert accuracy >= 0.97
    assert accuracy == json.loads((short / "metrics.json").read_text())["classifier_accuracy_real"]
    assert judge.accuracy(pixels[1], (digits[1] + 1) % 10) < 0.03
    seen = {row.numpy().tobytes() for row in pixels[0]}
    assert not any(row.numpy().tobytes() in seen for row in pixels[1])


def test_the_notebook_runs_on_what_the_demo_leaves(short, tmp_path):
    """All of quickstart.ipynb, fine-tuned for two steps and pushed to a Hub on this machine."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo").symlink_to(short)
    notebook = nbformat.read(ROOT / "notebooks/quickstart.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if cell.cell_type == "code")
    settings.source += '\nfinetuning_steps, repo = 2, "me/digits"'
    for cell in notebook.cells:
        cell.pop("outputs", None)
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
        client.execute(env=environment)
        assert "model.safetensors" in hub.repositories["model", "me/digits"].files()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in data for data in shown) >= 5


@pytest.mark.parametrize("name", ["tokenizer_steps", "steps", "drawings"])
def test_a_demo_of_nothing_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"--{name} must be at least 1, got 0"):
        DemoArguments(**{name: 0})


@pytest.mark.slow
def test_the_demo_draws_what_it_is_asked_and_names_what_it_sees(tmp_path):
    metrics = demo(DemoArguments(output_dir=str(tmp_path / "demo")))
    assert metrics["digit_accuracy"] >= 0.95
    assert metrics["caption_accuracy"] >= 0.95
    assert metrics["classifier_accuracy_real"] >= 0.97
    assert metrics["classifier_accuracy_reconstructed"] >= 0.95
    assert metrics["psnr"] >= 22
    assert metrics["codebook_usage"] >= 0.9
