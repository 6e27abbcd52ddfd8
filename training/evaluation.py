"""Measures a tokenizer or a model: `unitok-hf evaluate --checkpoint out/tokenizer --data_path pictures.parquet`.

Tokenizer, over every picture of the data:

- PSNR in dB and SSIM (11x11 Gaussian window) by torchmetrics, per picture and then averaged; RGB; both sides clamped and
  rounded to 8 bits first, as a saved file would be; data range 1; a picture without any error counts as 100 dB
- codebook usage (share of the codes that occur) and perplexity (exp of the entropy of their distribution)

Model, over every stream of the data: bits per text token and bits per image token, that is the mean negative log2 of the
probability the model gave to what came; half of the streams have the image first, half the text.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.utils import make_image_grid
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from ..modeling_unitok.modeling_unitok import UniTokOutput
from ..modeling_unitok.modeling_vq import UniTokVQModel
from ..processing.image_processing_unitok import to_pictures
from .collators import (
    PictureCollator,
    PictureDataset,
    StreamCollator,
    StreamDataset,
    read_rows,
    require_pictures,
    require_size,
    require_text,
)
from .generate import load_model


def picture_rows(rows: list[torch.Tensor]) -> Image.Image:
    """One picture of several rows of pictures, each (n, 3, H, W) in [-1, 1]."""
    return make_image_grid([picture for row in rows for picture in to_pictures(row)], len(rows), len(rows[0]))


def reconstruction_scores(pixels: torch.Tensor, reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
    """`psnr` in dB and `ssim` of each picture, (B,) each, of two batches (B, 3, H, W) in [-1, 1]."""
    first, second = (((x.float().clamp(-1, 1) + 1) * 127.5).round() / 255 for x in (reconstruction, pixels))
    return {
        "psnr": peak_signal_noise_ratio(first, second, 1.0, dim=(1, 2, 3), reduction="none").clamp(max=100),
        "ssim": structural_similarity_index_measure(first, second, data_range=1.0, reduction="none"),
    }


class ReconstructionMeter:
    """Scores of a tokenizer over a whole set, batch by batch; works under several processes.

    Args:
        vq_model: the tokenizer, in evaluation mode.
        accelerator: of the run; gathers the scores of all processes.

    Attributes:
        shown: pixels and reconstructions of the first eight pictures.
    """

    def __init__(self, vq_model: UniTokVQModel, accelerator: Accelerator):
        self.vq_model, self.accelerator = vq_model, accelerator
        self.scores: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.shown: list[torch.Tensor] = []

    @torch.no_grad()
    def update(self, pixels: torch.Tensor) -> None:
        """Add pictures (B, 3, H, W) in [-1, 1]."""
        codes = self.vq_model.encode_to_indices(pixels)
        reconstruction = self.vq_model.decode_from_indices(codes).sample
        found = reconstruction_scores(pixels, reconstruction) | {"codes": codes}
        for name, values in self.accelerator.gather_for_metrics(found).items():
            self.scores[name].append(values.cpu())
        self.shown = self.shown or [pixels[:8].cpu(), reconstruction[:8].cpu()]

    def compute(self) -> dict[str, float]:
        """`psnr`, `ssim`, `codebook_usage`, `codebook_perplexity`."""
        scores = {name: torch.cat(values) for name, values in self.scores.items()}
        statistics = self.vq_model.codebook_stats(scores["codes"])
        return {name: scores[name].mean().item() for name in ("psnr", "ssim")} | {
            f"codebook_{name}": value for name, value in statistics.items()
        }


def nats_and_tokens(outputs: UniTokOutput, labels: torch.LongTensor, image_token_id: int) -> torch.Tensor:
    """Nats and tokens of text, nats and tokens of images of one batch, (4,).

    Args:
        outputs: what the model returned for these labels.
        labels: (B, T), with placeholders for the codes.
    """
    targets = labels[:, 1:]
    images = (targets == image_token_id).sum()
    texts = (targets != -100).sum() - images
    return torch.stack([outputs.text_loss * texts, texts, outputs.image_loss * images, images])


@torch.no_grad()
def stream_bits(model, batches: Iterable[dict], accelerator: Accelerator) -> dict[str, float]:
    """Mean negative log2-likelihood of streams.

    Args:
        model: a UniTok model in evaluation mode.
        batches: as `StreamCollator` makes them; each process brings its share.
        accelerator: of the run; sums over the processes.

    Returns:
        `text_bits` and `image_bits` per token (nan where there is none), and `loss` in nats per token of either kind.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # on the CPU: not every device has float64
    for batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        sums += nats_and_tokens(model(**batch, skip_logits=True), batch["labels"], model.config.image_token_id).cpu()
    text_nats, texts, image_nats, images = accelerator.reduce(sums.float().to(accelerator.device)).tolist()
    return {
        "loss": (text_nats + image_nats) / (texts + images),
        "text_bits": text_nats / texts / math.log(2) if texts else math.nan,
        "image_bits": image_nats / images / math.log(2) if images else math.nan,
    }


@dataclass
class EvaluateArguments:
    """Arguments of `evaluate`: a tokenizer or a model, told apart by its configuration, and the data to measure it on."""

    checkpoint: str = field(metadata={"help": "Folder of a trained tokenizer or model."})
    data_path: str = field(metadata={"help": "Parquet file, folder of Parquet files, or pattern, from prepare-data."})
    text_column: str = field(default="text", metadata={"help": "Column of the captions, for a model."})
    batch_size: int = field(default=64, metadata={"help": "Rows per batch."})
    seed: int = field(default=0, metadata={"help": "Decides which streams have the image first."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file to write the measures to."})


def evaluate(args: EvaluateArguments) -> dict[str, float]:
    """Measure as the arguments say; prints and returns the measures.

    Raises:
        OSError, ValueError: the model or the data cannot be used, or `output_file` exists.
    """
    if args.output_file is not None:
        if Path(args.output_file).exists():
            raise ValueError(f"{args.output_file} exists; choose another --output_file")
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    config = Path(args.checkpoint) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no tokenizer or model at {args.checkpoint}")
    accelerator = Accelerator()
    rows = read_rows(args.data_path)
    if "_class_name" in json.loads(config.read_text(encoding="utf-8")):
        found = _evaluate_tokenizer(args, rows, accelerator)
    else:
        found = _evaluate_model(args, rows, accelerator)
    found = {"checkpoint": args.checkpoint, "data_path": args.data_path, "rows": len(rows)} | found
    print(json.dumps(found, indent=2))
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _evaluate_tokenizer(args: EvaluateArguments, rows, accelerator: Accelerator) -> dict[str, float]:
    vq_model = UniTokVQModel.from_pretrained(args.checkpoint).to(accelerator.device).eval()
    require_size(rows, vq_model.config.sample_size)
    require_pictures(rows)
    meter = ReconstructionMeter(vq_model, accelerator)
    loader = torch.utils.data.DataLoader(
        PictureDataset(rows, "none", args.seed), args.batch_size, collate_fn=PictureCollator()
    )
    for batch in tqdm(accelerator.prepare(loader), desc="evaluating", unit="batch"):
        meter.update(batch["pixel_values"])
    return meter.compute()


def _evaluate_model(args: EvaluateArguments, rows, accelerator: Accelerator) -> dict[str, float]:
    model, processor = load_model(args.checkpoint, accelerator.device)
    tokenizer = processor.tokenizer
    require_size(rows, model.model.vqmodel.config.sample_size)
    require_text(rows, args.text_column)
    streams = StreamDataset(
        rows,
        tokenizer,
        model.vocabulary.codes_per_image,
        args.text_column,
        image_first=0.5,
        caption_dropout=0.0,
        max_length=model.config.text_config.max_position_embeddings,
        augment="none",
        seed=args.seed,
    )
    loader = torch.utils.data.DataLoader(streams, args.batch_size, collate_fn=StreamCollator(tokenizer))
    return stream_bits(model, tqdm(accelerator.prepare(loader), desc="evaluating", unit="batch"), accelerator)
