"""How well tokenizers give pictures back, under one protocol, which is printed with the numbers.

- pictures are taken as they are in the data, all of them, once, unless their size does not divide into codes
- both sides are clamped to [-1, 1] and rounded to 8 bits first, as a saved file would be
- PSNR in dB, SSIM (11x11 Gaussian window) and MS-SSIM by torchmetrics: per picture, RGB, data range 1, then averaged; a
  picture without any error counts as 100 dB. MS-SSIM has five scales; small pictures hold fewer, whose weights are then
  scaled to sum to one
- LPIPS, or the stand-in with its own name (see `perceptual`); rFID, or the stand-in with its own name (see `frechet`)
- usage (share of the codes that occur), perplexity (exp of the entropy of their distribution), bits per pixel (of codes of
  equal length)

Published numbers are seldom comparable: repositories differ in resizing, rounding, data range, and in what the reference is.

Letters: B batch.
"""

import json
import logging
import math
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from tqdm import tqdm

from ..modeling_unitok.modeling_vq import UniTokVQModel, usage_and_perplexity
from ..processing.image_processing_unitok import to_pictures
from .collators import PictureCollator, PictureDataset, require_images, require_pictures
from .frechet import EXTRACTORS, Moments, frechet_distance
from .perceptual import DISTANCES
from .pretrained import first_available


logger = logging.getLogger(__name__)

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11  # side of the Gaussian window of SSIM


def picture_rows(rows: list[torch.Tensor]) -> Image.Image:
    """One picture of several rows of pictures, each (n, 3, H, W) in [-1, 1]."""
    return make_image_grid([picture for row in rows for picture in to_pictures(row)], len(rows), len(rows[0]))


def ms_ssim_scales(height: int, width: int) -> int:
    """How many of the five scales of MS-SSIM fit into a picture: torchmetrics asks for sides of 11 (scales - 1)² pixels."""
    fits = [scales for scales in range(2, 6) if min(height, width) >= WINDOW * (scales - 1) ** 2]
    return max(fits, default=1)


def rounded(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1], clamped and rounded to 8 bits."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def reconstruction_scores(pixels: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
    """`psnr` in dB, `ssim` and `ms_ssim` of each picture, (B,) each, of two batches (B, 3, H, W) in [-1, 1]."""
    first, second = ((rounded(x) + 1) / 2 for x in (reconstruction, pixels))
    weights = MS_SSIM_WEIGHTS[: ms_ssim_scales(*pixels.shape[-2:])]
    weights = tuple(weight / sum(weights) for weight in weights)
    ms_ssim = multiscale_structural_similarity_index_measure(
        first, second, data_range=1.0, reduction="none", betas=weights
    )
    return {
        "psnr": peak_signal_noise_ratio(first, second, 1.0, dim=(1, 2, 3), reduction="none").clamp(max=100),
        "ssim": structural_similarity_index_measure(first, second, data_range=1.0, reduction="none"),
        "ms_ssim": ms_ssim.reshape(len(pixels)),
    }


class ReconstructionMeter:
    """Scores of a tokenizer over a whole set, batch by batch; works under several processes.

    Args:
        vq_model: the tokenizer, in evaluation mode.
        accelerator: of the run; gathers the scores of all processes.
        distance: a perceptual distance to measure, too.
        extractor: a network whose features of the reconstructions are kept as `moments`.

    Attributes:
        shown: pixels and reconstructions of the first eight pictures.
    """

    def __init__(
        self,
        vq_model: UniTokVQModel,
        accelerator: Accelerator,
        distance: nn.Module | None = None,
        extractor: nn.Module | None = None,
    ):
        self.vq_model, self.accelerator = vq_model, accelerator
        self.distance, self.extractor, self.moments = distance, extractor, Moments()
        self.scores: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.counts = torch.zeros(vq_model.config.num_vq_embeddings, dtype=torch.int64)
        self.shown: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, pixels: torch.Tensor) -> None:
        """Add pictures (B, 3, H, W) in [-1, 1]."""
        codes = self.vq_model.encode_to_indices(pixels)
        reconstruction = self.vq_model.decode_from_indices(codes).sample
        found = reconstruction_scores(pixels, reconstruction) | {"codes": codes}
        if self.distance is not None:
            found[self.distance.name] = self.distance(rounded(reconstruction), rounded(pixels))
        if self.extractor is not None:
            found["features"] = self.extractor.features(rounded(reconstruction))
        found = self.accelerator.gather_for_metrics(found)
        self.counts += torch.bincount(found.pop("codes").flatten().cpu(), minlength=len(self.counts))
        if self.extractor is not None:
            self.moments.add(found.pop("features"))
        for name, values in found.items():
            self.scores[name].append(values.cpu())
        self.shown = self.shown or [pixels[:8].cpu(), reconstruction[:8].cpu()]

    def compute(self) -> dict[str, float]:
        """`psnr`, `ssim`, `ms_ssim`, the perceptual distance by its name, `codebook_usage`, `codebook_perplexity`."""
        means = {name: torch.cat(values).mean().item() for name, values in self.scores.items()}
        return means | {f"codebook_{name}": value for name, value in usage_and_perplexity(self.counts).items()}


def load_tokenizer(checkpoint: str, device: torch.device) -> UniTokVQModel:
    """A tokenizer folder, ours or of stock `diffusers.VQModel`, in evaluation mode.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, or its weights are corrupt.
    """
    file = Path(checkpoint) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {checkpoint}")
    kind = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    if kind not in ("VQModel", "UniTokVQModel"):
        raise ValueError(f"{checkpoint} holds no image tokenizer, but {kind or 'something else'}")
    return UniTokVQModel.from_pretrained(checkpoint).to(device).eval()


def evaluate_tokenizers(
    checkpoints: list[str], rows: datasets.Dataset, data_path: str, batch_size: int, accelerator: Accelerator
) -> dict:
    """Measure tokenizers on the same pictures.

    Returns:
        `protocol`, and for each of the `tokenizers` its folder and measures.

    Raises:
        OSError, ValueError: a folder holds no tokenizer, or the pictures do not divide into its codes.
    """
    width, height = require_images(rows)
    require_pictures(rows)
    models = [load_tokenizer(checkpoint, accelerator.device) for checkpoint in checkpoints]
    for checkpoint, model in zip(checkpoints, models, strict=True):
        if width % model.downsampling or height % model.downsampling:
            raise ValueError(
                f"pictures of {width}x{height} pixels do not divide into the codes of {checkpoint}, which stand for "
                f"{model.downsampling}x{model.downsampling} each; prepare the data with another --image_size"
            )
    distance, no_distance = first_available(DISTANCES.values())
    extractor, no_extractor = first_available(EXTRACTORS)
    for network in (distance, extractor):
        if network is not None:
            network.to(accelerator.device)
    meters = [ReconstructionMeter(model, accelerator, distance, extractor) for model in models]
    real = Moments()
    data = PictureDataset(rows, "none", 0)
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size, collate_fn=PictureCollator()))
    for batch in tqdm(loader, desc="evaluating", unit="batch", disable=not accelerator.is_local_main_process):
        if extractor is not None:
            features = extractor.features(rounded(batch["pixel_values"]))
            real.add(accelerator.gather_for_metrics(features))
        for meter in meters:
            meter.update(batch["pixel_values"])
    found = []
    for checkpoint, model, meter in zip(checkpoints, models, meters, strict=True):
        measures = meter.compute()
        if extractor is not None:
            measures[extractor.name] = frechet_distance(real, meter.moments)
        bits = math.log2(model.config.num_vq_embeddings) / model.downsampling**2
        found.append({"checkpoint": checkpoint} | measures | {"bits_per_pixel": bits})
    protocol = {
        "data_path": data_path,
        "pictures": len(rows),
        "size": f"{width}x{height}",
        "resize": "none",
        "rounding": "clamped and rounded to 8 bits on both sides",
        "averaging": "per picture, RGB, data range 1",
        "ms_ssim_scales": ms_ssim_scales(height, width),
        "perceptual_distance": "; ".join([*no_distance, distance.title if distance else "none measured"]),
        "frechet_features": "; ".join([*no_extractor, extractor.title if extractor else "none measured"]),
        "frechet_weights_sha256": extractor.sha256 if extractor else None,
    }
    return {"protocol": protocol, "tokenizers": found}


def table(found: dict) -> str:
    """The protocol, a line each, and the measures as a table."""
    lines = [f"{name}: {value}" for name, value in found["protocol"].items()]
    names = list(found["tokenizers"][0])
    lines += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in found["tokenizers"]:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
