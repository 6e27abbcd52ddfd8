"""What every mode of training leaves behind is a folder that stock diffusers reads right, or no folder at all."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import datasets
import diffusers
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from unitok_hf import UniTokVQModel
from unitok_hf.modeling_unitok.export_vq import ExportError
from unitok_hf.training import vq_trainer
from unitok_hf.training.quantizers import QUANTIZERS
from unitok_hf.training.vq_trainer import VQTrainingArguments, train_tokenizer


ROOT = Path(__file__).resolve().parent.parent
MODES = [(mode, norm) for mode in QUANTIZERS for norm in ("none", "l2")]
SETTINGS = {
    "image_size": 32,
    "block_out_channels": [16, 16, 16],
    "norm_num_groups": 16,
    "latent_channels": 6,
    "num_vq_embeddings": 24,
    "max_steps": 8,
    "continuous_fraction": 0.3,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_steps": 4,
    "eval_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> str:
    """A Parquet file of 16 pictures of smoothly mixed random colours."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 256, (16, 4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    pictures = [Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC) for picture in corners]
    path = tmp_path_factory.mktemp("colours") / "colours.parquet"
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(str(path))
    return str(path)


def arguments(data: str, output_dir: Path | str, **options) -> VQTrainingArguments:
    own = {"data_path": data, "eval_data_path": data, "output_dir": str(output_dir), "per_device_train_batch_size": 8}
    return VQTrainingArguments(**SETTINGS | own | options)


@pytest.fixture(scope="session")
def runs(tmp_path_factory, colours):
    """The folder of a run of a mode: eight steps, k-means after the third, checkpoints after the fourth and the last."""

    @cache
    def run(mode: str, norm: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "tokenizer"
        with redirect_stdout(io.StringIO()):
            train_tokenizer(arguments(colours, folder, quantizer=mode, codebook_norm=norm))
        return folder

    return run


def pixels_of(data: str) -> torch.Tensor:
    """The pictures of a Parquet file, (n, 3, 32, 32) in [-1, 1]."""
    rows = datasets.Dataset.from_parquet(data).with_format("torch")
    return torch.stack([row["image"] for row in rows]) / 127.5 - 1


def right_codes(mode: str, norm: str, latents: torch.Tensor, table: torch.Tensor) -> torch.LongTensor:
    """Codes by the definition of the mode, in float64."""
    latents, table = latents.double(), table.double()
    if norm == "l2":
        return (F.normalize(latents, dim=1) @ F.normalize(table, dim=1).T).argmax(dim=1)
    if mode == "ibq":
        return (latents[:, :-1] @ table[:, :-1].T).argmax(dim=1)
    return torch.cdist(latents, table, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)


@pytest.mark.parametrize(("mode", "norm"), MODES)
def test_stock_diffusers_does_what_training_did(runs, colours, mode, norm):
    folder = runs(mode, norm)
    stock, ours = diffusers.VQModel.from_pretrained(folder), UniTokVQModel.from_pretrained(folder)
    assert stock.config.latent_channels == stock.config.vq_embed_dim == 6 + ((mode, norm) == ("ibq", "none"))
    stock.requires_grad_(False)
    ours.requires_grad_(False)
    pixels, table = pixels_of(colours), stock.quantize.embedding.weight
    latents = stock.encode(F.pixel_unshuffle(pixels, 4)).latents
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    random = rows.mean(dim=0) + rows.std(dim=0) * torch.randn(100_000, rows.shape[1])
    for vectors in (random, rows):
        expected = right_codes(mode, norm, vectors, table)
        found = stock.quantize(vectors.T[None, :, :, None])[2][2]
        assert (found == expected).double().mean() >= 0.9999
        assert len(found.unique()) >= 12
    codes = ours.encode_to_indices(pixels)
    assert torch.equal(codes.flatten(), right_codes(mode, norm, rows, table))
    pictures = F.pixel_shuffle(stock.decode(latents).sample, 4)
    assert torch.allclose(ours.decode_from_indices(codes).sample, pictures, rtol=0, atol=1e-4)
    if norm == "l2":
        assert torch.allclose(table.norm(dim=1), torch.ones(24), atol=1e-6)
        assert rows.norm(dim=1).mean().item() == pytest.approx(1, abs=0.3)
    if (mode, norm) == ("ibq", "none"):
        assert not latents[:, -1].any() and not stock.post_quant_conv.weight[:, -1].any()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.name}: {name}": x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize(("mode", "norm"), [("ema", "l2"), ("grad", "none"), ("simvq", "l2"), ("ibq", "none")])
def test_a_resumed_run_is_the_one_that_was_never_stopped(runs, colours, tmp_path, mode, norm):
    run = runs(mode, norm)
    options = {"quantizer": mode, "codebook_norm": norm, "resume_from_checkpoint": str(run / "checkpoint-4")}
    train_tokenizer(arguments(colours, tmp_path / "run", **options))
    for part in (".", "checkpoint-8"):
        expected, found = tensors(run / part), tensors(tmp_path / "run" / part)
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    optimizers = [
        torch.load(folder / "checkpoint-8/optimizer.pt", weights_only=True)["state"]
        for folder in (run, tmp_path / "run")
    ]
    for number, state in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][number][name]) for name, value in state.items())


PER_RANK = """
import json, sys
from safetensors.torch import save_file
from unitok_hf.training import vq_trainer


def keep(self, args, state, control, model, **_):
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, f"{args.output_dir}/rank{args.process_index}.safetensors")


vq_trainer.CodebookCallback.on_train_end = keep
for settings in json.loads(sys.argv[1]):
    vq_trainer.train_tokenizer(vq_trainer.VQTrainingArguments(**settings))
"""


def test_two_processes_train_as_one(runs, colours, tmp_path):
    """Two batches of four, as one batch of eight: the same codes on both, and those of the run alone but for rounding."""
    modes = [("grad", "l2"), ("simvq", "none"), ("ibq", "none")]
    settings = [
        SETTINGS
        | {"data_path": colours, "eval_data_path": colours, "output_dir": str(tmp_path / mode), "save_strategy": "no"}
        | {"per_device_train_batch_size": 4, "quantizer": mode, "codebook_norm": norm}
        for mode, norm in modes
    ]
    (tmp_path / "program.py").write_text(PER_RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [*launcher, str(tmp_path / "program.py"), json.dumps(settings)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for mode, norm in modes:
        ranks = [load_file(tmp_path / mode / f"rank{rank}.safetensors") for rank in (0, 1)]
        assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == [], mode
        alone = load_file(runs(mode, norm) / "checkpoint-8/diffusion_pytorch_model.safetensors")
        name, width = "quantize.embedding.weight", 6  # a root in the column that ibq adds makes rounding large
        assert torch.allclose(ranks[0][f"vq.{name}"][:, :width], alone[name][:, :width], atol=0.01), mode


@pytest.fixture
def spread(vq_model) -> UniTokVQModel:
    """The tiny tokenizer with latents of unit variance, and codes among them."""
    with torch.no_grad():
        pixels = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
        rows = vq_model.encode(pixels).latents.permute(0, 2, 3, 1).flatten(0, 2)
        vq_model.quant_conv.weight /= rows.std(dim=0)[:, None, None, None]
        vq_model.quant_conv.bias.copy_((vq_model.quant_conv.bias - rows.mean(dim=0)) / rows.std(dim=0))
        vq_model.codebook.copy_(vq_model.encode(pixels).latents.permute(0, 2, 3, 1).flatten(0, 2)[:64])
    return vq_model


def test_an_export_is_what_save_pretrained_writes(spread, tmp_path, noise):
    (tmp_path / "empty").mkdir()
    spread.save_pretrained(tmp_path / "saved")
    spread.export(tmp_path / "new/tokenizer", noise)
    spread.export(tmp_path / "empty")
    for folder in ("new/tokenizer", "empty"):
        assert {file.name for file in (tmp_path / folder).iterdir()} == {
            file.name for file in (tmp_path / "saved").iterdir()
        }
        for file in (tmp_path / "saved").iterdir():
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "new", "saved"]


def far_from_the_origin(model: UniTokVQModel):
    """Latents whose squares have no digits left for the distances between codes."""
    model.quant_conv.bias += 3e3
    model.codebook.add_(3e3)


def unequal_lengths(model: UniTokVQModel):
    """Codes as if the training by cosine had forgotten to make them unit vectors."""
    model.codebook.mul_(torch.linspace(0.5, 2, 64)[:, None])
    return lambda rows: (F.normalize(rows, dim=1) @ F.normalize(model.codebook, dim=1).T).argmax(dim=1)


def missing_column(model: UniTokVQModel):
    """Codes for dot products without the column that makes these distances."""
    return lambda rows: (rows @ model.codebook.T).argmax(dim=1)


def another_decoder(model: UniTokVQModel):
    """A picture from memory that the file does not give."""
    model.decoder.register_forward_hook(lambda module, inputs, output: output + 3e-4)


def half_precision(model: UniTokVQModel):
    model.bfloat16()


def not_finite(model: UniTokVQModel):
    model.codebook[5, 2] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            far_from_the_origin,
            r"the same code to \d+\.\d+% of 100,064 latents, 99.99% are needed; the norms of .* 8\d{3}",
        ),
        (unequal_lengths, r"the same code to .* those of codes"),
        (missing_column, "the same code to"),
        (another_decoder, r"decodes differs by 0.0003, 0.0001 is allowed"),
        (half_precision, "torch.bfloat16"),
        (not_finite, "quantize.embedding.weight is not finite"),
    ],
)
def test_an_export_that_stock_diffusers_reads_otherwise_is_refused(spread, noise, tmp_path, spoil, message):
    spread.export(tmp_path / "whole", noise)
    with torch.no_grad():
        lookup = spoil(spread)
    with pytest.raises(ValueError, match=message) as error:
        spread.export(tmp_path / "broken", noise, lookup)
    assert isinstance(error.value, ExportError) or spoil is not_finite
    assert [entry.name for entry in tmp_path.iterdir()] == ["whole"]


def test_an_export_does_not_write_over_anything(spread, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match="already holds files"):
            spread.export(folder)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("mine.txt", "precious")]


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_written(spread, tmp_path):
    with torch.no_grad():
        spread.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(ValueError, match="decoder.conv_out.bias is not finite; nothing was saved"):
        spread.save_pretrained(tmp_path / "tokenizer")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_export_fails_leaves_no_tokenizer(colours, tmp_path, monkeypatch):
    def spoil(self, args, state, control, model, **_):
        model.tokenizer.codebook.mul_(torch.linspace(0.5, 2, 24)[:, None])

    monkeypatch.setattr(vq_trainer.CodebookCallback, "on_train_end", spoil)
    options = {"quantizer": "ema", "codebook_norm": "l2", "save_strategy": "no"}
    with pytest.raises(ExportError, match="the same code to"):
        train_tokenizer(arguments(colours, tmp_path / "run", **options))
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= {"samples", "run.json"}
