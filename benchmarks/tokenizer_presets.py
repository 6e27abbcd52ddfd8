"""Which tokenizer preset makes the most of a CPU minute?

python benchmarks/tokenizer_presets.py --data_path emoji64.parquet --group_column group --minutes 7 \
    configs/vq-64.yaml configs/vq-64-plain.yaml

Trains every preset from scratch for the same time on the same rows and measures it on rows of unseen groups. The number
of steps is set beforehand from the measured speed, so that each run ends its own learning-rate schedule.
"""

import argparse
import tempfile
import time
import zlib

import torch
import yaml
from accelerate import Accelerator

from unitok_hf import UniTokVQModel
from unitok_hf.training.collators import PictureCollator, PictureDataset, read_rows
from unitok_hf.training.reconstruction import ReconstructionMeter
from unitok_hf.training.vq_trainer import VQTrainer, VQTrainingArguments, build_training_model


def split_by_group(rows, column: str, share: float = 0.1):
    """Rows to train on, and rows of so many tenths of the groups, chosen by checksum; a group is never on both sides."""
    held = [zlib.crc32(str(group).encode()) % 10 < 10 * share for group in rows[column]]
    train = rows.select([index for index, out in enumerate(held) if not out])
    return train, rows.select([index for index, out in enumerate(held) if out])


def pixels_of(rows) -> torch.Tensor:
    """All pictures of some rows, (N, 3, H, W)."""
    dataset = PictureDataset(rows, "none", 0)
    return PictureCollator()([dataset[index] for index in range(len(dataset))])["pixel_values"]


def run(preset: dict, train, test, minutes: float, seed: int) -> dict:
    """Steps, speed, PSNR, SSIM, usage and perplexity of one preset."""

    def trainer(max_steps: int, folder: str) -> VQTrainer:
        arguments = VQTrainingArguments(
            data_path="", output_dir=folder, max_steps=max_steps, seed=seed, eval_strategy="no", save_strategy="no",
            disable_tqdm=True, logging_strategy="no", **preset,
        )  # fmt: skip
        torch.manual_seed(seed)
        return VQTrainer(
            build_training_model(arguments), arguments, train_dataset=PictureDataset(train, arguments.augment, seed)
        )

    with tempfile.TemporaryDirectory() as folder:
        trainer(5, folder).train()
        begin = time.perf_counter()
        trainer(20, folder).train()
        steps = int(60 * minutes / ((time.perf_counter() - begin) / 20))
        measured = trainer(steps, folder)
        begin = time.perf_counter()
        measured.train()
        seconds = time.perf_counter() - begin
    vq_model: UniTokVQModel = measured.model.tokenizer.eval()
    meter = ReconstructionMeter(vq_model, Accelerator())
    for batch in pixels_of(test).split(64):
        meter.update(batch.to(vq_model.device))
    parameters = sum(parameter.numel() for parameter in vq_model.parameters())
    return {"parameters": parameters, "steps": steps, "steps_per_second": steps / seconds, **meter.compute()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="+", help="YAML files with arguments of train-tokenizer")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--group_column", required=True)
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train, test = split_by_group(read_rows(options.data_path), options.group_column)
    print(f"{len(train)} rows to train on, {len(test)} to measure on, {torch.get_num_threads()} threads")
    print("| preset | parameters | steps | steps/s | PSNR dB | SSIM | usage | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.presets:
        with open(name, encoding="utf-8") as file:
            preset = yaml.safe_load(file)
        row = run(preset, train, test, options.minutes, options.seed)
        print(
            f"| {name} | {row['parameters'] / 1e6:.1f} M | {row['steps']} | {row['steps_per_second']:.2f} "
            f"| {row['psnr']:.2f} | {row['ssim']:.3f} | {row['codebook_usage']:.2f} "
            f"| {row['codebook_perplexity']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
