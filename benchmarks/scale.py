"""What do a million rows cost? Memory, time and bytes of every step that reads data, at two sizes of the same data.

python benchmarks/scale.py --data_path emoji64.parquet --rows 10000 1000000

The rows are real ones, repeated, in row groups of a hundred. Each step runs in a process of its own, `encode` and
`prepare-data` over all rows, both trainings for `--steps` steps with `--streaming true`. Of its memory the largest resident
set is told, and the largest part of it that is not a mapped file, which the system may drop at any time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import torch

from unitok_hf import UniTokVQModel


ROWS_PER_GROUP = 100
VQ = {"block_out_channels": (32, 32, 32), "latent_channels": 8, "num_vq_embeddings": 1024}


def repeat(source: str, rows: int, folder: Path) -> Path:
    """Parquet of so many rows, picture and text of real ones over and over, in files of 100,000 rows."""
    table = pq.read_table(source, columns=["image", "text"])
    folder.mkdir()
    written = 0
    while written < rows:
        size = min(100_000, rows - written)
        with pq.ParquetWriter(folder / f"{written // 100_000:05d}.parquet", table.schema) as writer:
            left = size
            while left:
                part = table.slice(0, left)
                writer.write_table(part, row_group_size=ROWS_PER_GROUP)
                left -= len(part)
        written += size
    return folder


def run(*words: object) -> tuple[float, float, float]:
    """Seconds, largest resident set and largest anonymous part of it in MB of a command line and its workers."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:  # no pipe, which would be full one day
        process = subprocess.Popen(
            [sys.executable, "-m", "unitok_hf.training.cli", *map(str, words)],
            env=environment, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        resident = anonymous = 0
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                infos = [part.memory_info() for part in [watched, *watched.children(recursive=True)]]
            except psutil.NoSuchProcess:
                continue
            resident = max(resident, sum(info.rss for info in infos))
            anonymous = max(anonymous, sum(info.rss - info.shared for info in infos))
            time.sleep(0.05)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(errors.read())
    return time.perf_counter() - begin, resident / 2**20, anonymous / 2**20


def size_of(folder: Path) -> int:
    """Bytes of the Parquet files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="steps of the loop; all when not given")
    parser.add_argument("--work_dir", help="where the data go; a temporary folder when not given")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    print("| rows | step | seconds | resident MB | anonymous MB | bytes per row |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.work_dir) as temporary:
        work = Path(temporary)
        torch.manual_seed(0)
        UniTokVQModel(**VQ).save_pretrained(work / "tokenizer")
        held = repeat(options.data_path, 200, work / "held")
        for rows in options.rows:
            data, codes = repeat(options.data_path, rows, work / f"data{rows}"), work / f"codes{rows}"
            trained = {
                "--max_steps": options.steps, "--streaming": "true", "--eval_data_path": held, "--save_strategy": "no",
                "--eval_strategy": "no", "--disable_tqdm": "true", "--use_cpu": "true",
            }  # fmt: skip
            trained = [word for pair in trained.items() for word in pair]
            steps = {
                "prepare-data": [
                    "--dataset",
                    data,
                    "--streaming",
                    "true",
                    "--output_file",
                    work / f"new{rows}/a.parquet",
                ],
                "encode": ["--checkpoint", work / "tokenizer", "--data_path", data, "--output_dir", codes],
                "train-tokenizer": ["--data_path", data, "--output_dir", work / f"t{rows}", *trained]
                + ["--block_out_channels", 32, 32, 32, "--latent_channels", 8, "--num_vq_embeddings", 256],
                "train": ["--data_path", data, "--output_dir", work / f"m{rows}", *trained]
                + ["--visual_tokenizer_path", work / "tokenizer", "--depth", 2],
            }
            written = {"prepare-data": work / f"new{rows}", "encode": codes}
            for name, words in steps.items():
                if options.only is None or name in options.only:
                    seconds, resident, anonymous = run(name, *words)
                    size = f"{size_of(written[name]) / rows:.0f}" if name in written else ""
                    print(
                        f"| {rows} | {name} | {seconds:.0f} | {resident:.0f} | {anonymous:.0f} | {size} |", flush=True
                    )


if __name__ == "__main__":
    main()
