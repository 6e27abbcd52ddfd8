"""Does the recipe make a better tokenizer than the ones in use, in the same time?

pip install vector-quantize-pytorch
python benchmarks/tokenizer_quality.py --data_path emoji64.parquet --group_column group --minutes 10 --seeds 0 1 2

Every method trains the inner network of `configs/vq-64.yaml` from scratch for the same time on the same rows, with the same
rates, schedule, batches and order of pictures; what differs is the quantizer with its start, the losses, and that ours has
Muon for the matrices, as the preset says, and sees every other picture mirrored. All are measured on rows of unseen groups.
The number of steps is set beforehand from the measured speed of each method, so that every run ends its own learning-rate
schedule and a disturbed machine cannot change a result.

- ours: `unitok-hf train-tokenizer` with its defaults
- diffusers: stock `VQModel.forward`, mean squared error + its own commitment loss
- vector-quantize-pytorch: its EMA `VectorQuantize` with default arguments in the place of the codebook, mean squared error +
  its commitment loss
- taming: codebook by gradient from U(-1/K, 1/K), L1 + its codebook loss (arXiv:2012.09841), no perceptual or adversarial
  loss, as none of the others has one
"""

import argparse
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
import yaml
from diffusers import VQModel
from tokenizer_presets import pixels_of, split_by_group
from torch import nn
from transformers import Trainer
from vector_quantize_pytorch import VectorQuantize

from unitok_hf.training.collators import EpochCallback, PictureCollator, PictureDataset, read_rows
from unitok_hf.training.frechet import EfficientNetFeatures, Moments, frechet_distance
from unitok_hf.training.reconstruction import reconstruction_scores
from unitok_hf.training.vq_trainer import VQTrainer, VQTrainingArguments, build_training_model


class Ours(nn.Module):
    """The tokenizer as `train-tokenizer` leaves it."""

    def __init__(self, args: VQTrainingArguments):
        super().__init__()
        self.training_model = build_training_model(args)

    def trainer(self, args: VQTrainingArguments, rows) -> Trainer:
        return VQTrainer(self.training_model, args, train_dataset=rows)

    def reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstructions (B, 3, H, W) and codes."""
        codes = self.training_model.tokenizer.encode_to_indices(pixels)
        return self.training_model.tokenizer.decode_from_indices(codes).sample, codes


class Rival(nn.Module):
    """Stock `VQModel` of the same inner network, trained by the plain `Trainer`; subclasses say with which loss."""

    def __init__(self, args: VQTrainingArguments):
        super().__init__()
        inner = build_training_model(args).vq.config
        names = ("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels")
        names += ("layers_per_block", "latent_channels", "num_vq_embeddings", "norm_num_groups")
        self.vq = VQModel(**{name: inner[name] for name in names})
        self.patch = args.patch_size

    def trainer(self, args: VQTrainingArguments, rows) -> Trainer:
        return Trainer(self, args, data_collator=PictureCollator(), train_dataset=rows, callbacks=[EpochCallback()])

    def quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantised latents (B, d, h, w), loss, codes."""
        quantized, loss, (_, _, codes) = self.vq.quantize(latents)
        return quantized, loss, codes

    def run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        latents = self.vq.encode(F.pixel_unshuffle(pixels, self.patch)).latents
        quantized, loss, codes = self.quantize(latents)
        sample = self.vq.decode(quantized, force_not_quantize=True).sample
        return F.pixel_shuffle(sample, self.patch), loss, codes

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        sample, loss, _ = self.run(pixel_values)
        return {"loss": F.mse_loss(sample, pixel_values) + loss}

    def reconstruct(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sample, _, codes = self.run(pixels)
        return sample, codes


class Diffusers(Rival):
    """Everything stock."""


class VectorQuantizePytorch(Rival):
    """The library's quantizer with its defaults."""

    def __init__(self, args: VQTrainingArguments):
        super().__init__(args)
        self.vq.quantize = VectorQuantize(args.latent_channels, args.num_vq_embeddings, accept_image_fmap=True)

    def quantize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        quantized, codes, loss = self.vq.quantize(latents)
        return quantized, loss.sum(), codes


class Taming(Rival):
    """L1; the quantizer of taming-transformers is the stock one, its `legacy` loss included."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        sample, loss, _ = self.run(pixel_values)
        return {"loss": F.l1_loss(sample, pixel_values) + loss}


METHODS = {"ours": Ours, "diffusers": Diffusers, "vector-quantize-pytorch": VectorQuantizePytorch, "taming": Taming}


def train(method: type[nn.Module], preset: dict, rows, steps: int, seed: int) -> tuple[nn.Module, float]:
    """A trained model and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = VQTrainingArguments(
            data_path="", output_dir=folder, max_steps=steps, seed=seed, eval_strategy="no", save_strategy="no",
            disable_tqdm=True, logging_strategy="no", report_to="none", **preset,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = method(arguments)
        trainer = model.trainer(arguments, PictureDataset(rows, arguments.augment if method is Ours else "none", seed))
        begin = time.perf_counter()
        trainer.train()
        return model.eval(), time.perf_counter() - begin


@torch.no_grad()
def measure(model: nn.Module, pictures: torch.Tensor, network: EfficientNetFeatures, codebook_size: int) -> dict:
    """PSNR, SSIM, Frechet distance on EfficientNet-Lite0 features, usage."""
    found = [model.reconstruct(batch) for batch in pictures.split(64)]
    reconstructions = torch.cat([sample for sample, _ in found]).clamp(-1, 1)
    codes = torch.cat([codes.flatten() for _, codes in found])
    scores = reconstruction_scores(pictures, reconstructions)
    real, made = Moments(), Moments()
    for pixels, reconstruction in zip(pictures.split(64), reconstructions.split(64), strict=True):
        real.add(network.features(pixels))
        made.add(network.features(reconstruction))
    return {name: value.mean().item() for name, value in scores.items()} | {
        "frechet": frechet_distance(real, made),
        "usage": codes.unique().numel() / codebook_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="configs/vq-64.yaml", help="YAML file with arguments of train-tokenizer")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--group_column", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with open(options.preset, encoding="utf-8") as file:
        preset = yaml.safe_load(file)
    rows, test = split_by_group(read_rows(options.data_path), options.group_column)
    pictures = pixels_of(test)
    network = EfficientNetFeatures()
    print(f"{len(rows)} rows to train on, {len(test)} to measure on, {torch.get_num_threads()} threads")
    rates = {name: [] for name in options.methods}
    for _ in range(3):
        for name in options.methods:
            steps = 20
            rates[name].append(steps / train(METHODS[name], preset, rows, steps, 0)[1])
    print("| method | seed | steps | steps/s before | PSNR dB | SSIM | Frechet (EfficientNet-Lite0) | usage |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        for name in options.methods:
            rate = statistics.median(rates[name])
            steps = int(60 * options.minutes * rate)
            model, _ = train(METHODS[name], preset, rows, steps, seed)
            row = measure(model, pictures, network, preset["num_vq_embeddings"])
            print(
                f"| {name} | {seed} | {steps} | {rate:.2f} | {row['psnr']:.2f} | {row['ssim']:.3f} "
                f"| {row['frechet']:.1f} | {row['usage']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
