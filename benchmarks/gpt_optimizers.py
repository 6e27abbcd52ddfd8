"""AdamW or Muon? Bits per token on unseen pictures after the same time.

python benchmarks/gpt_optimizers.py --data_path emoji64.parquet --group_column group \
    --visual_tokenizer_path out/tokenizer --minutes 3

NanoChat of depth 4 on cached codes and captions, batches of 32; every optimizer and learning rate trains for the same time,
in steps counted beforehand from its measured speed, so that each run ends its own schedule. Measured on rows of unseen
groups, in bits per token of either kind, and the mean over all tokens in nats, which is what is trained.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from tokenizer_presets import split_by_group

from unitok_hf.training.collators import read_rows
from unitok_hf.training.gpt_trainer import GPTTrainingArguments, train_gpt
from unitok_hf.training.token_cache import EncodeArguments, encode


def train(folder: Path, tokenizer: str, steps: int, **options) -> tuple[dict[str, float], float]:
    """Measures after so many steps, and the seconds that all took."""
    with tempfile.TemporaryDirectory(dir=folder) as output_dir:
        begin = time.perf_counter()
        metrics = train_gpt(
            GPTTrainingArguments(
                data_path=str(folder / "train"), eval_data_path=str(folder / "test"), visual_tokenizer_path=tokenizer,
                output_dir=f"{output_dir}/run", max_steps=steps, eval_strategy="no", save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True, sample_prompts=[], use_cpu=True, **options,
            )
        )  # fmt: skip
        return metrics, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--group_column", required=True)
    parser.add_argument("--visual_tokenizer_path", required=True)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument(
        "--ways", nargs="+", default=["adamw:1e-3", "adamw:2e-3", "muon:1e-3", "muon:2e-3", "muon:4e-3"]
    )
    options = parser.parse_args()
    ways = [(kind, float(rate)) for kind, rate in (way.split(":") for way in options.ways)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = split_by_group(read_rows(options.data_path), options.group_column)
        for part, rows in zip(("train", "test"), parts, strict=True):
            rows.to_parquet(str(folder / f"{part}.parquet"))
            encode(EncodeArguments(options.visual_tokenizer_path, str(folder / f"{part}.parquet"), str(folder / part)))
        seconds = {}
        for kind in dict(ways):
            times = [
                train(folder, options.visual_tokenizer_path, steps, matrix_optimizer=kind)[1] for steps in (5, 5, 45)
            ]
            seconds[kind] = (times[2] - times[1]) / 40
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.minutes:g} minutes each")
        print(
            "| optimizer | rate | steps | ms/step | text bits | image bits | nats per token |\n|---|---|---|---|---|---|---|"
        )
        for kind, rate in ways:
            steps = int(60 * options.minutes / seconds[kind])
            found, _ = train(folder, options.visual_tokenizer_path, steps, matrix_optimizer=kind, learning_rate=rate)
            print(
                f"| {kind} | {rate:g} | {steps} | {1000 * seconds[kind]:.0f} | {found['eval_text_bits']:.3f} "
                f"| {found['eval_image_bits']:.3f} | {found['eval_loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
