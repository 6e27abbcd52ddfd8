"""Writes a tokenizer for stock diffusers, and the folder appears only when stock diffusers has proved it right.

The folder is written beside its place, loaded by `diffusers.VQModel`, and held against the model in memory:

- codes: of 100,000 random latents with the mean and spread of the latents of pictures, and of those latents themselves,
  at least 99.99 % must be the same. Two ways of computing a distance in fp32 differ now and then where a latent lies
  between two codes; more than that means latents too large for fp32, or a codebook that is not what training used
- pictures of the same codes must agree within 1e-4

`save_pretrained` writes the same files and only refuses weights that are not finite: it is what checkpoints call.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import VQModel
from diffusers.utils import logging

from .modeling_vq import UniTokVQModel, full_fp32, nearest_codes


RANDOM_LATENTS = 100_000
SAME_CODES = 0.9999
PICTURE_DIFFERENCE = 1e-4
DISTANCE_BYTES = 64 * 2**20  # the (rows, K) matrix that stock diffusers makes of one block of latents


class ExportError(ValueError):
    """Stock diffusers would not do with the folder what the model in memory does; nothing was written."""


def export(
    model: UniTokVQModel,
    folder: str | os.PathLike,
    pixel_values: torch.Tensor | None = None,
    lookup: Callable[[torch.Tensor], torch.LongTensor] | None = None,
) -> None:
    """What `UniTokVQModel.export` does; see there."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already holds files; export into a new folder")
    if model.dtype != torch.float32:
        raise ExportError(f"a tokenizer is exported in float32, this one is in {model.dtype}; call .float() first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".exporting-", dir=folder.parent)
    try:
        model.save_pretrained(beside)
        require_equal(model, beside, pixel_values, lookup)
        os.chmod(beside, 0o777 & ~_umask())  # mkdtemp keeps others out
        if folder.exists():
            folder.rmdir()
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@torch.no_grad()
def require_equal(
    model: UniTokVQModel,
    folder: str | os.PathLike,
    pixel_values: torch.Tensor | None = None,
    lookup: Callable[[torch.Tensor], torch.LongTensor] | None = None,
) -> None:
    """Hold a folder, as stock diffusers loads it, against a model; arguments and errors as `UniTokVQModel.export`."""
    generator = torch.Generator().manual_seed(0)
    if pixel_values is None:
        shape = (8, 3, model.config.sample_size, model.config.sample_size)
        pixel_values = torch.rand(shape, generator=generator) * 2 - 1
    stock = load_stock(folder).to(model.device).eval()
    latents = stock.encode(model._to_network(pixel_values.to(model.device))).latents  # (B, d, h, w)
    real = latents.permute(0, 2, 3, 1).flatten(0, 2)
    random = torch.randn(RANDOM_LATENTS, real.shape[1], generator=generator).to(model.device)
    random = real.mean(dim=0) + real.std(dim=0) * random
    rows = torch.cat([random, real])  # (N, d)
    expected = lookup(rows) if lookup else nearest_codes(rows, model.codebook)
    blocks = rows.split(max(1, DISTANCE_BYTES // (4 * model.config.num_vq_embeddings)))
    with full_fp32(rows.device):
        found = torch.cat([stock.quantize(block.T[None, :, :, None])[2][2] for block in blocks])
    share = (found == expected).float().mean().item()
    if not share >= SAME_CODES:
        raise ExportError(
            f"stock diffusers gives the same code to {share:.4%} of {len(rows):,} latents, {SAME_CODES:.2%} are needed; "
            f"the norms of latents are up to {real.norm(dim=1).max().item():.4g}, those of codes "
            f"{model.codebook.norm(dim=1).min().item():.4g} to {model.codebook.norm(dim=1).max().item():.4g}"
        )
    codes = expected[RANDOM_LATENTS:].view(latents.shape[0], *latents.shape[2:])
    ours = model.decode_from_indices(codes).sample
    theirs = model._from_network(stock.decode(model.indices_to_latents(codes)).sample)
    difference = (ours - theirs).abs().max().item()
    if not difference <= PICTURE_DIFFERENCE:
        raise ExportError(
            f"a picture that stock diffusers decodes differs by {difference:.4g}, {PICTURE_DIFFERENCE:g} is allowed"
        )


def load_stock(folder: str | os.PathLike) -> VQModel:
    """A saved tokenizer as stock diffusers loads it, without its remark that it ignores what only we put in the config."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return VQModel.from_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)


def _umask() -> int:
    """The process's mask of permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
