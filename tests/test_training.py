"""Both trainers: what a run leaves behind, that it goes on as if it had never stopped, and what it refuses."""

import argparse
import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path

import datasets
import diffusers
import pytest
import torch
from conftest import PER_RANK, TWO_PROCESSES, flags, run_program
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, NanoChatForCausalLM

import unitok_hf_cli as cli
from unitok_hf import UniTokForConditionalGeneration, UniTokVQModel
from unitok_hf.training.collators import EpochDataset
from unitok_hf.training.gpt_trainer import GPTTrainingArguments, train_gpt, train_text_tokenizer
from unitok_hf.training.losses import multi_scale_l1
from unitok_hf.training.runs import folder_beside, save_beside, take_number
from unitok_hf.training.vq_trainer import VQTrainingArguments, build_training_model, train_tokenizer


ROOT = Path(__file__).resolve().parent.parent
QUIET = {"disable_tqdm": True, "use_cpu": True}
COMMON = QUIET | {"max_steps": 6, "logging_steps": 1, "save_steps": 1, "save_total_limit": None, "eval_strategy": "no"}
TINY_VQ = {"block_out_channels": [32, 32, 32], "latent_channels": 8, "num_vq_embeddings": 32}
TINY_GPT = {"depth": 1, "hidden_size": 64, "text_vocab_size": 300, "max_length": 48, "visual_vocab_size": 32}
VARIANTS = {
    "plain": {"per_device_train_batch_size": 4},
    "augmented and accumulated": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "augment": "affine",
    },
}


@pytest.fixture(scope="session")
def data(tmp_path_factory, pictures, captions) -> str:
    """A Parquet file of the eight pictures and captions."""
    path = tmp_path_factory.mktemp("data") / "pictures.parquet"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features).to_parquet(str(path))
    return str(path)


def tokenizer_arguments(data: str, output_dir: Path | str, **options) -> VQTrainingArguments:
    settings = COMMON | TINY_VQ | {"continuous_fraction": 0.3, "per_device_train_batch_size": 4}
    return VQTrainingArguments(
        **settings | {"data_path": data, "eval_data_path": data, "output_dir": str(output_dir)} | options
    )


def gpt_arguments(data: str, tokenizer: Path | str, output_dir: Path | str, **options) -> GPTTrainingArguments:
    settings = COMMON | TINY_GPT | {"visual_tokenizer_path": str(tokenizer), "per_device_train_batch_size": 4}
    return GPTTrainingArguments(
        **settings | {"data_path": data, "eval_data_path": data, "output_dir": str(output_dir)} | options
    )


@pytest.fixture(scope="session")
def tokenizer_runs(tmp_path_factory, data):
    """The folder of a tokenizer of a variant: six steps with a checkpoint after each, k-means after the second."""

    @cache
    def run(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "tokenizer"
        train_tokenizer(tokenizer_arguments(data, folder, **VARIANTS[variant]))
        return folder

    return run


@pytest.fixture(scope="session")
def tokenizer_run(tokenizer_runs) -> Path:
    """The folder of the plain one."""
    return tokenizer_runs("plain")


@pytest.fixture(scope="session")
def image_tokenizer(tmp_path_factory) -> Path:
    """The folder of the tokenizer that the models are given."""
    folder = tmp_path_factory.mktemp("image_tokenizer")
    torch.manual_seed(0)
    vq_model = UniTokVQModel(**TINY_VQ)
    torch.nn.init.normal_(vq_model.codebook, std=0.3)
    vq_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt_runs(tmp_path_factory, data, image_tokenizer):
    """The folder of a model of a variant: six steps with a checkpoint after each."""

    @cache
    def run(variant: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "model"
        train_gpt(gpt_arguments(data, image_tokenizer, folder, **VARIANTS[variant]))
        return folder

    return run


@pytest.fixture(scope="session")
def gpt_run(gpt_runs) -> Path:
    """The folder of the plain one."""
    return gpt_runs("plain")


def history(checkpoint: Path) -> list[dict]:
    """What was logged up to a checkpoint: its training steps, and the last evaluation."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def require_equal_runs(first: Path, second: Path) -> None:
    """Weights, what training remembers, optimizer and log of two finished runs are the same, bit for bit."""
    for file in [*first.glob("*.safetensors"), *(first / "checkpoint-6").glob("*.safetensors")]:
        expected, found = load_file(file), load_file(second / file.relative_to(first))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], file
    optimizers = [torch.load(run / "checkpoint-6/optimizer.pt", weights_only=True)["state"] for run in (first, second)]
    assert optimizers[0].keys() == optimizers[1].keys() and len(optimizers[0]) > 5
    for number, state in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][number][name]) for name, value in state.items())
    assert history(first / "checkpoint-6") == history(second / "checkpoint-6")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stopped_after", [1, 3, 4])
def test_a_resumed_tokenizer_is_the_one_that_was_never_stopped(tokenizer_runs, data, tmp_path, variant, stopped_after):
    """Before k-means and within an epoch; after it and within one; between two epochs."""
    run = tokenizer_runs(variant)
    shutil.copytree(run / f"checkpoint-{stopped_after}", tmp_path / f"run/checkpoint-{stopped_after}")
    options = VARIANTS[variant] | {"resume_from_checkpoint": "last"}
    train_tokenizer(tokenizer_arguments(data, tmp_path / "run", **options))
    require_equal_runs(run, tmp_path / "run")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stopped_after", [3, 4])
def test_a_resumed_model_is_the_one_that_was_never_stopped(
    gpt_runs, image_tokenizer, data, tmp_path, variant, stopped_after
):
    run = gpt_runs(variant)
    options = VARIANTS[variant] | {"resume_from_checkpoint": str(run / f"checkpoint-{stopped_after}")}
    train_gpt(gpt_arguments(data, image_tokenizer, tmp_path / "run", **options))
    require_equal_runs(run, tmp_path / "run")


def test_a_fresh_process_resumes_both_bit_for_bit(tokenizer_run, gpt_run, image_tokenizer, data, tmp_path):
    commands = []
    for name, command, run, own in (
        ("tokenizer", "train-tokenizer", tokenizer_run, TINY_VQ | {"continuous_fraction": 0.3}),
        ("model", "train", gpt_run, TINY_GPT | {"visual_tokenizer_path": image_tokenizer}),
    ):
        own |= {"output_dir": tmp_path / name, "resume_from_checkpoint": run / "checkpoint-3"}
        commands.append([command, *flags(COMMON | own | {"data_path": data, "eval_data_path": data, "batch_size": 4})])
    program = "import json, sys; from unitok_hf_cli import main; [main(argv) for argv in json.loads(sys.argv[1])]"
    run_program([sys.executable, "-c", program, json.dumps(commands)])
    require_equal_runs(tokenizer_run, tmp_path / "tokenizer")
    require_equal_runs(gpt_run, tmp_path / "model")


def test_two_processes_train_as_one(tokenizer_run, gpt_run, image_tokenizer, data, tmp_path):
    """Two batches of two, as one batch of four: the same losses, and the same codebook on both."""
    (tmp_path / "program.py").write_text(PER_RANK)
    common = COMMON | {"data_path": data, "eval_data_path": data, "batch_size": 2}
    tokenizer = common | TINY_VQ | {"continuous_fraction": 0.3, "output_dir": tmp_path / "tokenizer"}
    model = common | TINY_GPT | {"visual_tokenizer_path": image_tokenizer, "output_dir": tmp_path / "model"}
    argument = json.dumps([["train-tokenizer", *flags(tokenizer)], ["train", *flags(model)]])
    run_program([*TWO_PROCESSES, str(tmp_path / "program.py"), argument])
    ranks = [load_file(tmp_path / f"tokenizer/rank{rank}.safetensors") for rank in (0, 1)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    assert (ranks[0]["codebook_state.updates"], ranks[0]["codebook_state.tokens"]) == (4, 4 * 16)
    for name, alone in (("tokenizer", tokenizer_run), ("model", gpt_run)):
        both = history(tmp_path / name / "checkpoint-6")
        one = history(alone / "checkpoint-6")
        assert len(both) == len(one) == 6 + 1
        for found, expected in zip(both, one, strict=True):
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                rounding = (
                    1e-4 if "norm" in key else 1e-5
                )  # norms, of gradients and of the largest latent, show more of it
                assert found[key] == pytest.approx(value, abs=1e-5, rel=rounding), (name, key)
        measured = [json.loads((run / "eval_results.json").read_text()) for run in (tmp_path / name, alone)]
        assert measured[0] == pytest.approx(measured[1], abs=1e-3)


def test_every_epoch_draws_anew_and_a_resumed_run_knows_which_one_it_is_in(data, tmp_path, monkeypatch, tokenizer_run):
    drawn = []
    draw = EpochDataset.generator
    monkeypatch.setattr(
        EpochDataset, "generator", lambda self, index: drawn.append((self.epoch, index)) or draw(self, index)
    )
    train_tokenizer(tokenizer_arguments(data, tmp_path / "new", augment="affine", save_strategy="no"))
    assert sorted(drawn[:24]) == [(epoch, index) for epoch in range(3) for index in range(8)]
    drawn.clear()
    options = {"resume_from_checkpoint": str(tokenizer_run / "checkpoint-3"), "save_strategy": "no"}
    train_tokenizer(tokenizer_arguments(data, tmp_path / "resumed", **options))
    assert [epoch for epoch, _ in drawn[:12]] == [1] * 4 + [2] * 8


def names(folder: Path) -> set[str]:
    """Files and folders, without the checkpoints."""
    return {entry.name for entry in folder.iterdir() if not entry.name.startswith("checkpoint-")}


def test_a_tokenizer_run_leaves_a_tokenizer_and_no_pickles(tokenizer_run):
    run = tokenizer_run
    tokenizer = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert names(run) == tokenizer | {"training_args.json", "eval_results.json", "samples", "README.md"}
    for folder in (run, run / "checkpoint-3"):
        assert type(diffusers.AutoModel.from_pretrained(str(folder))) is diffusers.VQModel
    measured = json.loads((run / "eval_results.json").read_text())
    assert {"eval_psnr", "eval_ssim", "eval_codebook_usage", "eval_codebook_perplexity"} <= set(measured)
    last = load_file(run / "checkpoint-6/diffusion_pytorch_model.safetensors")
    assert all(
        torch.equal(last[name], weight) for name, weight in UniTokVQModel.from_pretrained(run).state_dict().items()
    )


def test_every_evaluation_leaves_pictures_above_their_reconstructions(data, tmp_path, pictures):
    train_tokenizer(
        tokenizer_arguments(data, tmp_path / "run", eval_strategy="steps", eval_steps=3, save_strategy="no")
    )
    files = sorted((tmp_path / "run/samples").iterdir())
    assert [file.name for file in files] == ["step_000003.png", "step_000006.png"]
    grids = [Image.open(file) for file in files]
    assert [grid.size for grid in grids] == [(8 * 64, 2 * 64)] * 2
    for number, picture in enumerate(pictures):
        assert grids[0].crop((64 * number, 0, 64 * number + 64, 64)).tobytes() == picture.tobytes()
    assert grids[0].crop((0, 0, 512, 64)).tobytes() == grids[1].crop((0, 0, 512, 64)).tobytes()
    assert grids[0].crop((0, 64, 512, 128)).tobytes() != grids[1].crop((0, 64, 512, 128)).tobytes()


def test_a_model_run_leaves_a_model_and_no_pickles(gpt_run):
    run = gpt_run
    model = {"config.json", "generation_config.json", "model.safetensors"}
    processor = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    written = {"training_args.json", "eval_results.json", "samples", "README.md"}
    assert names(run) == model | processor | written
    measured = json.loads((run / "eval_results.json").read_text())
    assert {"eval_loss", "eval_text_bits", "eval_image_bits"} <= set(measured)
    for folder in (run, run / "checkpoint-3"):
        model = AutoModel.from_pretrained(folder)
        assert type(model) is UniTokForConditionalGeneration
        assert not list(folder.glob("training_args.bin"))
    processor = AutoProcessor.from_pretrained(run)
    inputs = processor(text="a red circle", generation_mode="image", return_tensors="pt")
    assert AutoModel.from_pretrained(run).generate(**inputs, generation_mode="image").shape == (1, 16)


def test_what_is_trained_moves_and_what_is_frozen_does_not(gpt_run, image_tokenizer, tokenizer_run):
    given = load_file(image_tokenizer / "diffusion_pytorch_model.safetensors")
    first, last = load_file(gpt_run / "checkpoint-1/model.safetensors"), load_file(gpt_run / "model.safetensors")
    frozen = {name: name.removeprefix("model.vqmodel.") for name in last if "vqmodel" in name}
    assert set(frozen.values()) == set(given)
    assert all(torch.equal(last[name], given[own]) for name, own in frozen.items())
    trained = set(last) - set(frozen)
    groups = torch.load(gpt_run / "checkpoint-6/optimizer.pt", weights_only=True)["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(trained) > 5
    assert [name for name in trained if torch.equal(first[name], last[name])] == []

    weights = "diffusion_pytorch_model.safetensors"
    first, last = load_file(tokenizer_run / f"checkpoint-2/{weights}"), load_file(tokenizer_run / weights)
    assert [name for name in last if torch.equal(first[name], last[name])] == []


def test_the_log_has_the_terms_and_the_health_of_the_codebook(tokenizer_run, gpt_run):
    steps = [entry for entry in history(tokenizer_run / "checkpoint-6") if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for entry in steps:
        expected = entry["reconstruction"] + 0.25 * entry["commitment"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-5)
        assert (entry["commitment"] > 0) == ("codebook_usage" in entry) == (entry["step"] > 2)
    steps = [entry for entry in history(gpt_run / "checkpoint-6") if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for entry in steps:
        low, high = sorted([entry["text_loss"], entry["image_loss"]])
        assert 0 < low < entry["loss"] < high


def test_accumulated_batches_weigh_every_predicted_token_alike(data, tmp_path, image_tokenizer):
    losses = []
    for batch, accumulated in ((8, 1), (2, 4)):
        arguments = gpt_arguments(
            data,
            image_tokenizer,
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            save_steps=2,
            image_first=0.0,
            caption_dropout=0.5,
        )
        train_gpt(arguments)
        losses.append([entry["loss"] for entry in history(tmp_path / f"{batch}/checkpoint-2") if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_codebook_is_used_after_a_short_run(tmp_path):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(0, 256, (64, 4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    pictures = [Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC) for picture in colours]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": pictures}, features=features)
    rows.to_parquet(str(tmp_path / "colours.parquet"))
    options = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "save_strategy": "no"}
    metrics = train_tokenizer(tokenizer_arguments(str(tmp_path / "colours.parquet"), tmp_path / "run", **options))
    assert metrics["eval_codebook_usage"] >= 0.95
    assert metrics["eval_codebook_perplexity"] >= 0.6 * 32
    grey = -10 * math.log10((torch.from_numpy(colours) / 255 - 0.5).square().mean())
    assert metrics["eval_psnr"] > grey + 2


def test_the_loss_is_the_error_at_three_resolutions():
    pixels = torch.zeros(1, 3, 4, 4)
    reconstruction = pixels.clone()
    reconstruction[:, :, 0, 0] = 1.6
    # full: 1.6 / 16; halves: 0.4 in one of four; quarter: 0.1
    assert multi_scale_l1(reconstruction, pixels).item() == pytest.approx(0.1 + 0.5 * 0.1 + 0.5 * 0.1)
    reconstruction[:, :, 0, 1] = -1.6
    assert multi_scale_l1(reconstruction, pixels).item() == pytest.approx(0.2)  # pooled, the two cancel


def test_starting_the_codebook_does_not_change_what_the_network_computes(data, tmp_path):
    torch.manual_seed(0)
    model = build_training_model(tokenizer_arguments(data, tmp_path))
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        model.vq.quant_conv.weight *= 5
        for _ in range(2):
            model(pixels)
            model.codebook_state.step(model.vq.codebook, 0)
        latents = model.vq.encode(pixels).latents
        before = model.vq.decode(latents, force_not_quantize=True).sample
        model.start_codebook(1)
        scaled = model.vq.encode(pixels).latents
        after = model.vq.decode(scaled, force_not_quantize=True).sample
    assert not 0.9 < latents.std() < 1.1 and scaled.std().item() == pytest.approx(1, abs=0.01)
    assert torch.allclose(before, after, atol=1e-5)
    distances = torch.cdist(scaled.permute(0, 2, 3, 1).flatten(0, 2), model.vq.codebook)
    assert distances.amin(dim=1).square().mean() < 0.5 * 8  # far below the variance of the latents


def test_a_checkpointed_run_trains_as_a_plain_one(data, tmp_path):
    weights = []
    for name, options in (("plain", {}), ("checkpointed", {"activation_checkpointing": True})):
        train_tokenizer(tokenizer_arguments(data, tmp_path / name, max_steps=3, save_strategy="no", **options))
        weights.append(UniTokVQModel.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])


def test_the_best_tokenizer_can_be_kept_in_place_of_the_last(data, tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "psnr",
        "greater_is_better": False,  # so that the best one is not the last
        "continuous_fraction": 0.0,
    }
    metrics = train_tokenizer(tokenizer_arguments(data, tmp_path / "run", **options))
    found = {
        entry["step"]: entry["eval_psnr"] for entry in history(tmp_path / "run/checkpoint-6") if "eval_psnr" in entry
    }
    best = min(found, key=found.get)
    assert best < 6 and metrics["eval_psnr"] == found[best]
    kept = load_file(tmp_path / "run/diffusion_pytorch_model.safetensors")
    expected = load_file(tmp_path / f"run/checkpoint-{best}/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_the_text_model_alone_is_a_plain_nanochat(data, tmp_path, captions):
    options = {"use_visual_tokens": False, "visual_tokenizer_path": None, "visual_vocab_size": None}
    metrics = train_gpt(gpt_arguments(data, "", tmp_path / "run", **options))
    assert math.isfinite(metrics["eval_loss"])
    assert not list((tmp_path / "run").glob("*.bin")) and not list((tmp_path / "run").glob("*.pt"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert type(model) is NanoChatForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    inputs = tokenizer(captions, return_tensors="pt", padding=True)
    assert tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True) == captions[0]
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    assert model(**inputs, labels=labels).loss < math.log(len(tokenizer))  # it has learned something


def test_the_text_model_alone_needs_no_pictures_and_skips_rows_without_text(tmp_path, captions):
    features = datasets.Features({"caption": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"caption": [*captions, None, ""]}, features=features)
    rows.to_parquet(str(tmp_path / "text.parquet"))
    options = {"use_visual_tokens": False, "visual_tokenizer_path": None, "visual_vocab_size": None}
    options |= {"text_column": "caption", "max_steps": 5, "save_strategy": "no"}
    train_gpt(gpt_arguments(str(tmp_path / "text.parquet"), "", tmp_path / "run", **options))
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_given_text_tokenizer_is_used(data, tmp_path, gpt_run, image_tokenizer):
    own = train_text_tokenizer(["something else entirely"], 280)
    own.save_pretrained(tmp_path / "words")
    options = {"text_tokenizer_path": str(tmp_path / "words"), "max_steps": 1, "save_strategy": "no"}
    train_gpt(gpt_arguments(data, image_tokenizer, tmp_path / "run", **options))
    kept = AutoProcessor.from_pretrained(tmp_path / "run").tokenizer
    assert kept("something else").input_ids == own("something else").input_ids
    assert (
        kept("something else").input_ids
        != AutoProcessor.from_pretrained(gpt_run).tokenizer("something else").input_ids
    )


def refused(message: str, train, arguments, untouched: Path) -> None:
    """The run ends with this message before anything is written."""
    before = sorted(untouched.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(arguments)
    assert sorted(untouched.rglob("*")) == before


def test_wrong_tokenizers_are_refused_before_any_work(data, tmp_path, image_tokenizer):
    wrong = gpt_arguments(data, image_tokenizer, tmp_path / "run", visual_vocab_size=1024)
    refused("visual_vocab_size is 1024, but the tokenizer at .* has 32 codes", train_gpt, wrong, tmp_path)
    missing = gpt_arguments(data, tmp_path / "none", tmp_path / "run")
    refused("no image tokenizer at .*none; .*train-tokenizer", train_gpt, missing, tmp_path)
    with pytest.raises(ValueError, match="--visual_tokenizer_path is missing"):
        GPTTrainingArguments(data_path=data, **QUIET)


def test_wrong_data_is_refused_before_any_work(data, tmp_path, image_tokenizer, pictures):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    small = {"image": [picture.resize((32, 32)) for picture in pictures[:3]], "text": ["a", "b", "c"]}
    holes = {"image": [*pictures[:2], None], "text": ["a", "b", "c"]}
    for name, columns in (("small", small), ("holes", holes)):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / f"{name}.parquet"))
    small, holes = str(tmp_path / "small.parquet"), str(tmp_path / "holes.parquet")
    for options in ({"data_path": small}, {"eval_data_path": small}):
        message = "32x32 pixels, not 64x64"
        refused(message, train_tokenizer, tokenizer_arguments(data, tmp_path / "run", **options), tmp_path)
        refused(message, train_gpt, gpt_arguments(data, image_tokenizer, tmp_path / "run", **options), tmp_path)
    refused("1 rows .* no picture", train_tokenizer, tokenizer_arguments(holes, tmp_path / "run"), tmp_path)
    refused(
        "no column 'words'",
        train_gpt,
        gpt_arguments(data, image_tokenizer, tmp_path / "run", text_column="words"),
        tmp_path,
    )
    refused(
        "'image' holds no text", train_gpt, gpt_arguments(data, image_tokenizer, "run", text_column="image"), tmp_path
    )
    refused(
        "no Parquet data at", train_tokenizer, tokenizer_arguments(str(tmp_path / "x"), tmp_path / "run"), tmp_path
    )


def test_sizes_that_do_not_fit_are_refused_before_any_work(data, tmp_path):
    for message, options in (
        ("64x64 pixels does not divide into codes of 256x256", {"block_out_channels": [32] * 7}),
        ("at least 1, got 0", {"patch_size": 0}),
        ("divisible", {"block_out_channels": [33, 33, 33]}),
    ):
        refused(message, train_tokenizer, tokenizer_arguments(data, tmp_path / "run", **options), tmp_path)
    with pytest.raises(ValueError, match="--continuous_fraction must lie in"):
        tokenizer_arguments(data, tmp_path, continuous_fraction=1.0)
    for name in ("image_first", "caption_dropout"):
        with pytest.raises(ValueError, match=f"--{name} must lie in"):
            gpt_arguments(data, "", tmp_path, **{name: 1.5})
    with pytest.raises(ValueError, match="--label_smoothing_factor"):
        gpt_arguments(data, "", tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="--hidden_size must be a multiple of 64, got 100"):
        train_gpt(gpt_arguments(data, "", tmp_path / "run", use_visual_tokens=False, hidden_size=100))


def test_the_codebook_waits_for_enough_latents(data, tmp_path):
    options = {"num_vq_embeddings": 256, "continuous_fraction": 0.0}
    train_tokenizer(tokenizer_arguments(data, tmp_path / "enough", **options))
    steps = [entry for entry in history(tmp_path / "enough/checkpoint-6") if "loss" in entry]
    assert [entry["commitment"] > 0 for entry in steps] == [False] * 4 + [True] * 2  # 64 latents a step
    options["num_vq_embeddings"] = 512
    with pytest.raises(ValueError, match="ended after 6 steps with 384 latents seen, too few to make 512 codes"):
        train_tokenizer(tokenizer_arguments(data, tmp_path / "too_few", **options))
    assert not list((tmp_path / "too_few").glob("*.safetensors"))


def test_no_run_writes_over_another(data, tmp_path, tokenizer_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious.txt").write_text("mine")
    refused("run already holds files", train_tokenizer, tokenizer_arguments(data, tmp_path / "run"), tmp_path)
    elsewhere = str(tokenizer_run / "checkpoint-3")
    arguments = tokenizer_arguments(data, tmp_path / "run", resume_from_checkpoint=elsewhere)
    refused("run already holds files", train_tokenizer, arguments, tmp_path)
    for wanted in ("last", str(tmp_path / "none"), str(tmp_path / "run")):
        arguments = tokenizer_arguments(data, tmp_path / "run", resume_from_checkpoint=wanted)
        refused("there is no checkpoint to resume", train_tokenizer, arguments, tmp_path)


def test_a_checkpoint_cut_short_by_a_crash_is_passed_over(data, tmp_path, tokenizer_run):
    for step in (3, 4):
        shutil.copytree(tokenizer_run / f"checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
    (tmp_path / "run/checkpoint-4/trainer_state.json").unlink()
    (tmp_path / "run/checkpoint-4/optimizer.pt").write_bytes(b"half")
    train_tokenizer(tokenizer_arguments(data, tmp_path / "run", resume_from_checkpoint="last"))
    require_equal_runs(tokenizer_run, tmp_path / "run")


@pytest.mark.parametrize("saved", [True, False])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_way_back(data, tmp_path, saved, image_tokenizer):
    explosion = {"learning_rate": 1e30, "max_grad_norm": 0.0, "save_strategy": "steps" if saved else "no"}
    explosion |= {"warmup_steps": 0}
    way_back = "The last checkpoint is .*checkpoint-[12]$" if saved else "No checkpoint was written yet"
    with pytest.raises(
        ValueError, match=rf"not finite at step [23] \(loss .*reconstruction .*lower --learning_rate. {way_back}"
    ):
        train_tokenizer(tokenizer_arguments(data, tmp_path / "tokenizer", **explosion))
    message = rf"not finite at step [23] \(loss .*text_loss .*image_loss .*lower --learning_rate. {way_back}"
    with pytest.raises(ValueError, match=message):
        train_gpt(gpt_arguments(data, image_tokenizer, tmp_path / "model", **explosion))
    with pytest.raises(ValueError, match=r"not finite at step [23] \(loss"):
        train_gpt(gpt_arguments(data, "", tmp_path / "text", use_visual_tokens=False, **explosion))
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_a_model_is_there_whole_or_not_at_all(tmp_path):
    def save(folder: str) -> None:
        (Path(folder) / "a.txt").write_text("new")
        raise OSError("the disk is full")

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="the disk is full"):
        save_beside(str(tmp_path), save)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.txt": "old"}
    save_beside(str(tmp_path), lambda folder: (Path(folder) / "a.txt").write_text("new"))
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"a.txt": "new"}


def test_numbered_folders_are_new(tmp_path):
    def numbered() -> str:
        with folder_beside(tmp_path / "out") as beside:
            (beside / "a.txt").touch()
            return take_number(beside).name

    assert [numbered() for _ in range(3)] == ["001", "002", "003"]
    (tmp_path / "out/041").mkdir()
    (tmp_path / "out/notes").mkdir()
    assert numbered() == "042"
    assert sorted(entry.name for entry in (tmp_path / "out/042").iterdir()) == ["a.txt"]


@pytest.mark.parametrize(
    "config",
    sorted(path for path in (ROOT / "configs").iterdir() if not path.name.startswith("accelerate")),
    ids=lambda path: path.name,
)
def test_every_config_is_understood(config):
    name = "train-tokenizer" if config.name.startswith("vq") else "train"
    parser = cli.Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    fields = cli.add_arguments(parser, cli.COMMANDS[name])
    values = cli.read_arguments(parser, fields, [str(config), "--data_path", "x.parquet", "--use_cpu", "true"])
    if name == "train":
        arguments = GPTTrainingArguments(**values)
        assert arguments.use_visual_tokens is False or arguments.visual_tokenizer_path
    else:
        with torch.device("meta"):
            model = build_training_model(VQTrainingArguments(**values))
        assert model.vq.grid(model.vq.config.sample_size, model.vq.config.sample_size)


def test_the_guides_config_asks_for_the_default_tokenizer():
    values = json.loads((ROOT / "configs/unitok.json").read_text())
    assert values["use_visual_tokens"] is True
    assert values["visual_vocab_size"] == VQTrainingArguments(data_path="x", **QUIET).num_vq_embeddings
    assert values["visual_tokenizer_path"]


@pytest.fixture(scope="module")
def many(tmp_path_factory, pictures, captions) -> str:
    """Forty pictures and captions in row groups of four."""
    path = tmp_path_factory.mktemp("many") / "pictures.parquet"
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": pictures * 5, "text": [f"{text} {part}" for part in range(5) for text in captions]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path), batch_size=4)
    return str(path)


def test_streamed_rows_train_both_resumed_and_on_two_processes_as_one(many, image_tokenizer, tmp_path):
    """Windows of a few row groups; no pictures are lost or come twice, as every batch is that of one process."""
    for command, own in (
        ("train-tokenizer", TINY_VQ | {"continuous_fraction": 0.3, "adam_epsilon": 1e-3, "learning_rate": 1e-4}),
        ("train", TINY_GPT | {"visual_tokenizer_path": image_tokenizer}),
    ):
        common = COMMON | {"data_path": many, "eval_data_path": many, "streaming": "true", "max_steps": 12} | own
        common |= {"save_total_limit": 20}
        one, two = tmp_path / f"{command}-one", tmp_path / f"{command}-two"
        cli.main([command, *flags(common | {"output_dir": one, "batch_size": 8})])
        again = {"output_dir": tmp_path / f"{command}-again", "resume_from_checkpoint": one / "checkpoint-7"}
        cli.main([command, *flags(common | again | {"batch_size": 8})])
        words = [*TWO_PROCESSES, "-m", "unitok_hf.training.cli", command]
        run_program([*words, *flags(common | {"output_dir": two, "batch_size": 4})])
        expected, resumed, both = (
            [log["loss"] for log in history(run / "checkpoint-12") if "loss" in log]
            for run in (one, again["output_dir"], two)
        )
        assert resumed == expected
        assert both == pytest.approx(expected, rel=1e-5)


def test_streaming_holds_no_rows_out(many, tmp_path):
    with pytest.raises(ValueError, match="--streaming holds no rows out; pass --eval_data_path"):
        train_tokenizer(tokenizer_arguments(many, tmp_path / "run", eval_data_path=None, streaming=True))


def test_a_batch_that_streamed_rows_do_not_fill_is_refused_before_anything_is_written(many, image_tokenizer, tmp_path):
    options = {"eval_data_path": many, "streaming": True, "per_device_train_batch_size": 41}
    with pytest.raises(ValueError, match="40 rows do not fill a batch of 41"):
        train_tokenizer(tokenizer_arguments(many, tmp_path / "run", **options))
    with pytest.raises(ValueError, match="40 rows do not fill a batch of 41"):
        train_gpt(gpt_arguments(many, image_tokenizer, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_trained_with_muon_and_resumed(data, tmp_path):
    options = {"matrix_optimizer": "muon", "adversarial_weight": 0.1, "discriminator_layers": 1}
    train_tokenizer(tokenizer_arguments(data, tmp_path / "run", **options))
    resumed = options | {"resume_from_checkpoint": str(tmp_path / "run/checkpoint-3")}
    train_tokenizer(tokenizer_arguments(data, tmp_path / "again", **resumed))
    require_equal_runs(tmp_path / "run", tmp_path / "again")
