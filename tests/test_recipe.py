"""What the recipe of the tokenizer's training promises beyond one process and one batch: the GAN stage split over processes
and micro-batches, half precision, averaged weights, and a decoder that is improved alone."""

import json
import logging
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from conftest import PER_RANK, TWO_PROCESSES, flags, run_program
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from unitok_hf import UniTokVQModel
from unitok_hf.modeling_unitok.modeling_vq import nearest_codes
from unitok_hf.training.collators import PictureCollator, PictureDataset, read_rows
from unitok_hf.training.losses import RECONSTRUCTION_LOSSES
from unitok_hf.training.muon import MuonWith, kernels
from unitok_hf.training.quantizers import QUANTIZERS
from unitok_hf.training.vq_trainer import VQTrainer, VQTrainingArguments, build_training_model, train_tokenizer
from unitok_hf.training.weight_average import WeightAverage


TINY = {
    "block_out_channels": [32, 32, 32],
    "latent_channels": 8,
    "num_vq_embeddings": 32,
    "continuous_fraction": 0.2,
    "disable_tqdm": True,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
}
GAN = {"adversarial_weight": 0.2, "discriminator_start": 0.3, "adversarial_start": 0.4, "adversarial_ramp": 0.2}
TERMS = ("loss", "reconstruction", "commitment", "discriminator", "adversarial", "adaptive_weight", "logits_fake")


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> str:
    """64 pictures of four coloured squares each: no two alike."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randint(256, (64, 2, 2, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(square.numpy()).resize((64, 64), Image.Resampling.BICUBIC) for square in squares]
    path = tmp_path_factory.mktemp("data") / "colours.parquet"
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(str(path))
    return str(path)


def arguments(data: str, output_dir: Path, **options) -> VQTrainingArguments:
    return VQTrainingArguments(
        **TINY | {"data_path": data, "eval_data_path": data, "output_dir": str(output_dir)} | options
    )


def losses(run: Path) -> list[dict[str, float]]:
    """The terms of every step."""
    history = json.loads((run / "checkpoint-10/trainer_state.json").read_text())["log_history"]
    return [{name: entry[name] for name in TERMS if name in entry} for entry in history if "loss" in entry]


def test_the_gan_stage_is_the_same_in_one_piece_two_processes_and_micro_batches(colours, tmp_path):
    options = TINY | GAN | {"data_path": colours, "eval_data_path": colours, "max_steps": 10, "save_steps": 10}
    # few codes: where a latent lies between two, rounding decides, and then the runs are two runs; and Adam divides by the
    # size of a gradient, so that where it is all but rounding, so would be the step
    options |= {"save_strategy": "steps", "adam_epsilon": 1e-4, "num_vq_embeddings": 8}
    options |= {"learning_rate": 1e-4, "discriminator_learning_rate": 2e-5}
    train_tokenizer(VQTrainingArguments(**options, output_dir=str(tmp_path / "one"), per_device_train_batch_size=32))
    accumulated = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    train_tokenizer(VQTrainingArguments(**options, **accumulated, output_dir=str(tmp_path / "accumulated")))
    (tmp_path / "program.py").write_text(PER_RANK)
    own = {"output_dir": tmp_path / "two", "per_device_train_batch_size": 16}
    command = json.dumps([["train-tokenizer", *flags(options | own)]])
    run_program([*TWO_PROCESSES, str(tmp_path / "program.py"), command])

    ranks = [load_file(tmp_path / f"two/rank{rank}.safetensors") for rank in (0, 1)]
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    assert "discriminator.real_mean" in ranks[0] and "average.vq.quantize.embedding.weight" in ranks[0]
    one = losses(tmp_path / "one")
    assert "discriminator" not in one[2] and "discriminator" in one[3]
    assert "adversarial" not in one[4] and one[6]["adaptive_weight"] > 0
    two = losses(tmp_path / "two")
    assert two == losses(tmp_path / "accumulated")
    for step, (found, expected) in enumerate(zip(two, one, strict=True)):
        ratios = [terms.pop("adaptive_weight", 0) for terms in (found, expected)]  # of norms, which show more rounding
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-3), step
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5), step


def test_under_bf16_the_lookup_stays_in_full_precision(colours, tmp_path):
    options = GAN | {"max_steps": 10, "per_device_train_batch_size": 16, "bf16": True, "save_strategy": "steps"}
    train_tokenizer(arguments(colours, tmp_path / "run", save_steps=10, **options))
    assert all(
        tensor.dtype != torch.bfloat16
        for tensor in load_file(tmp_path / "run/checkpoint-10/training_state.safetensors").values()
    )
    model = build_training_model(arguments(colours, tmp_path / "other")).train()
    torch.nn.init.normal_(model.vq.codebook)
    model.codebook_state.started.fill_(True)
    seen = {}
    model.codebook_state.register_forward_hook(
        lambda module, inputs, output: seen.update(rows=inputs[0], vectors=output.vectors)
    )
    pixels = PictureCollator()([PictureDataset(read_rows(colours), "none", 0)[row] for row in range(8)])[
        "pixel_values"
    ]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(pixels)
    assert seen["vectors"].dtype == torch.float32 and outputs["loss"].dtype == torch.float32
    chosen = model.vq.codebook[nearest_codes(seen["rows"].double().float(), model.vq.codebook)]
    torch.testing.assert_close(seen["vectors"], chosen, atol=1e-5, rtol=1e-5)


@pytest.fixture
def trained(colours, tmp_path) -> Path:
    """A short tokenizer run."""
    train_tokenizer(arguments(colours, tmp_path / "trained", max_steps=20, per_device_train_batch_size=16))
    return tmp_path / "trained"


@pytest.mark.parametrize(
    ("mode", "norm"), [("ema", "none"), ("ema", "l2"), ("grad", "none"), ("simvq", "none"), ("ibq", "none")]
)
def test_the_averaged_codebook_is_what_its_mode_says_a_codebook_is(mode, norm):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[mode](32, 8, norm=norm)
    width = 8 + quantizer.extra_columns
    live = UniTokVQModel(block_out_channels=(32, 32), latent_channels=width, num_vq_embeddings=32)
    average = WeightAverage(live, decay=0.9)
    quantizer.observe(torch.randn(2000, width))
    quantizer.step(live.codebook.data, 0)
    quantizer.start(live.codebook.data, 1)
    average.copy(live)
    before = average.vq.codebook.clone()
    with torch.no_grad():
        live.codebook.data[:, :8] = quantizer.unit(live.codebook.data[:, :8] + 0.1 * torch.randn(32, 8))
        quantizer.refresh(live.codebook.data)
        live.decoder.conv_out.bias += 1
    average.update(live, quantizer, revived=torch.tensor([3, 5]))
    table, weight = average.vq.codebook, 0.1  # the first step of the average weighs 1/10 of the past
    if norm == "l2":
        torch.testing.assert_close(table.norm(dim=1), torch.ones(32))
    elif mode == "ibq":
        torch.testing.assert_close(table.norm(dim=1), table.norm(dim=1).max().expand(32))
    else:
        expected = weight * before + (1 - weight) * live.codebook
        torch.testing.assert_close(table[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    torch.testing.assert_close(table[[3, 5], :8], live.codebook[[3, 5], :8])
    shift = average.vq.decoder.conv_out.bias - live.decoder.conv_out.bias
    torch.testing.assert_close(shift, torch.full_like(shift, -weight))


def test_the_average_is_what_is_evaluated_and_released(colours, tmp_path):
    model = build_training_model(arguments(colours, tmp_path / "run", max_steps=20, weight_ema_decay=0.9))
    data = PictureDataset(read_rows(colours), "none", 0)
    args = arguments(colours, tmp_path / "run", max_steps=20, weight_ema_decay=0.9, per_device_train_batch_size=16)
    trainer = VQTrainer(model, args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert model.tokenizer is model.average.vq
    differs = [
        name
        for name, weight in model.vq.state_dict().items()
        if not torch.equal(weight, model.average.vq.state_dict()[name])
    ]
    assert "decoder.conv_out.weight" in differs and "quantize.embedding.weight" in differs
    trainer._save(str(tmp_path / "saved"))
    saved = UniTokVQModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, model.average.vq.state_dict()[name]) for name, weight in saved.state_dict().items())
    plain = build_training_model(arguments(colours, tmp_path / "plain", weight_ema_decay=0.0))
    assert plain.average is None and plain.tokenizer is plain.vq


def codes(folder: Path | str, data: str) -> torch.Tensor:
    pixels = PictureCollator()([PictureDataset(read_rows(data), "none", 0)[row] for row in range(64)])["pixel_values"]
    return UniTokVQModel.from_pretrained(folder).eval().encode_to_indices(pixels)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_decoder_improves_while_its_codes_stay(trained, colours, tmp_path, bf16):
    options = {
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "bf16": bf16,
        "decoder_only": True,
    }
    own = dict.fromkeys(("block_out_channels", "latent_channels", "num_vq_embeddings"))
    metrics = train_tokenizer(arguments(colours, tmp_path / "tuned", vq_model_path=str(trained), **own | options))
    before = json.loads((trained / "eval_results.json").read_text())
    assert metrics["eval_psnr"] > before["eval_psnr"] + 1
    assert metrics["eval_codebook_perplexity"] == before["eval_codebook_perplexity"]
    assert torch.equal(codes(trained, colours), codes(tmp_path / "tuned", colours))
    first, last = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (trained, tmp_path / "tuned")
    )
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert len(changed) == sum(name.startswith(("decoder.", "post_quant_conv.")) for name in first)


def test_a_decoder_run_resumes_bit_for_bit_and_its_gan_learns(trained, colours, tmp_path):
    own = dict.fromkeys(("block_out_channels", "latent_channels", "num_vq_embeddings"))
    options = own | GAN | {"decoder_only": True, "vq_model_path": str(trained), "per_device_train_batch_size": 16}
    options |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    train_tokenizer(arguments(colours, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "again/checkpoint-3")
    train_tokenizer(arguments(colours, tmp_path / "again", resume_from_checkpoint="last", **options))
    for name in ("diffusion_pytorch_model.safetensors", "training_state.safetensors"):
        whole, again = (load_file(tmp_path / run / "checkpoint-6" / name) for run in ("whole", "again"))
        assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


def test_codes_that_changed_are_not_saved(trained, colours, tmp_path, monkeypatch):
    from unitok_hf.training import vq_trainer

    monkeypatch.setattr(vq_trainer, "freeze_codes", lambda vq: None)  # as if the encoder had not been frozen
    monkeypatch.setattr(vq_trainer.VQTrainingModel, "_encode", lambda self, pixels: self.vq.encode(pixels).latents)
    own = dict.fromkeys(("block_out_channels", "latent_channels", "num_vq_embeddings"))
    options = own | {"decoder_only": True, "vq_model_path": str(trained), "max_steps": 3}
    with pytest.raises(ValueError, match="is not that of .*; nothing was saved"):
        train_tokenizer(arguments(colours, tmp_path / "run", **options))
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= {"samples", "run.json"}


def test_a_tokenizer_that_is_trained_on_gets_a_codebook_anew_and_starts_ahead(trained, colours, tmp_path):
    own = dict.fromkeys(("block_out_channels", "latent_channels", "num_vq_embeddings"))
    options = own | {"vq_model_path": str(trained), "max_steps": 20, "per_device_train_batch_size": 16}
    metrics = train_tokenizer(arguments(colours, tmp_path / "on", **options))
    assert metrics["eval_psnr"] > json.loads((trained / "eval_results.json").read_text())["eval_psnr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_only": True}, "name its folder by --vq_model_path"),
        ({"vq_model_path": "none"}, "no image tokenizer at none"),
        (
            {"vq_model_path": "TRAINED", "num_vq_embeddings": 64},
            "--num_vq_embeddings is 64, but 32 in the tokenizer at",
        ),
        ({"vq_model_path": "TRAINED", "quantizer": "ibq"}, "--quantizer ibq needs a column in the codebook"),
        ({"weight_ema_decay": 1.0}, r"--weight_ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(trained, colours, tmp_path, options, message):
    own = dict.fromkeys(("block_out_channels", "latent_channels", "num_vq_embeddings"))
    options = {name: str(trained) if value == "TRAINED" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        arguments(colours, tmp_path / "run", **own | options)


def test_the_train_step_can_be_compiled(colours, tmp_path, caplog):
    """aot_eager: the graphs of torch.compile without its C++ compiler; the losses are those of the step as it is."""
    options = {"max_steps": 4, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 4}
    found = []
    for name, own in (("plain", {}), ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"})):
        with caplog.at_level(logging.ERROR):
            train_tokenizer(arguments(colours, tmp_path / name, **options | own))
        history = json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text())["log_history"]
        found.append([entry["loss"] for entry in history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_reconstruction_losses_of_an_error_that_is_known():
    pixels = torch.zeros(2, 3, 8, 8)
    values = {name: loss(pixels + 0.5, pixels).item() for name, loss in RECONSTRUCTION_LOSSES.items()}
    assert values == pytest.approx({"l1": 0.5 * (1 + 0.5 + 0.5), "l2": 4 * 0.25, "l1_l2": 4 * 0.25 + 0.5})


def test_muon_takes_the_kernel_of_a_convolution_for_a_matrix(vq_model):
    coder = vq_model.encoder
    weights = kernels(coder)
    assert len(weights) > 8 and {weight.ndim for weight in weights} == {2, 4}
    assert not {id(coder.conv_in.weight), id(coder.conv_out.weight)} & {id(weight) for weight in weights}
    matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    expected = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    both = MuonWith(
        weights, [{"params": [coder.conv_in.weight]}], 0.01, 0.1, lambda rest: torch.optim.AdamW(rest, lr=1e-3)
    )
    before = coder.conv_in.weight.detach().clone()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            matrix.grad = weight.grad.flatten(1)
        coder.conv_in.weight.grad = torch.ones_like(before)
        both.step()
        expected.step()
        both.zero_grad()
        assert all(weight.grad is None for weight in [*weights, coder.conv_in.weight])
    assert all(torch.equal(a.flatten(1), b) for a, b in zip(weights, matrices, strict=True))
    assert not torch.equal(before, coder.conv_in.weight)
