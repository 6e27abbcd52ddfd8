"""What it costs: `python tests/reliability/kill_costs.py` prints

- seconds of a step and of a checkpoint, and how many of these go into knowing that it is whole, with the default tokenizer
  and the GPT of configs/unitok.json
- seconds from the kill of a command to its first step when it is started again at once, in a new process: imports, data,
  model and checkpoint
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


SAVE_STEPS = 500  # the default of both trainings


def costs(name: str, train, arguments) -> None:
    """Train, and print a row of the table: means without the first step and the first checkpoint."""
    from transformers import Trainer

    from unitok_hf.training.runs import RunTrainer

    timed = [
        (RunTrainer, "training_step"),
        (RunTrainer, "_save_checkpoint"),
        (RunTrainer, "_save_rng_state"),  # has what `Trainer`'s has, and the counting
        (Trainer, "_save_rng_state"),
    ]
    seconds: dict[tuple, list[float]] = {place: [] for place in timed}

    def stopwatch(place: tuple):
        function = getattr(*place)

        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[place].append(time.perf_counter() - began)
            return result

        return patch.object(*place, wrapped)

    with ExitStack() as patches:
        for place in timed:
            patches.enter_context(stopwatch(place))
        train(arguments)
    step, checkpoint, both, own = (statistics.mean(found[1:]) for found in seconds.values())
    share = checkpoint / (SAVE_STEPS * step)
    print(f"| {name} | {step:.3f} | {checkpoint:.3f} | {both - own:.4f} | {share:.3%} |", flush=True)


def from_kill_to_step(folder: Path, command: str) -> float:
    """Seconds until a killed command trains again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen:
        words = [sys.executable, "-m", "unitok_hf.training.cli", *command.split(), "--max_steps", "1000000"]
        return subprocess.Popen(
            words, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def wait_for_step(process: subprocess.Popen, steps: int) -> None:
        for line in process.stdout:
            steps -= "'loss'" in line
            if steps == 0:
                return

    process = start()
    wait_for_step(process, 3)  # a checkpoint after the second
    process.kill()
    process.wait()
    began = time.perf_counter()
    process = start()
    wait_for_step(process, 1)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return seconds


def main() -> None:
    import torch
    from kill_trial import COMMANDS, make_materials

    from unitok_hf.training.gpt_trainer import GPTTrainingArguments, train_gpt
    from unitok_hf.training.vq_trainer import VQTrainingArguments, train_tokenizer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        make_materials(folder / "made")
        data = str(folder / "made/pictures.parquet")
        common = {"data_path": data, "eval_data_path": data, "use_cpu": True, "disable_tqdm": True, "max_steps": 12}
        common |= {"save_steps": 3, "eval_strategy": "no", "per_device_train_batch_size": 8, "report_to": "none"}
        print(
            "| training | s per step | s per checkpoint | of these for the manifest | time spent on checkpoints, one in 500 steps |"
        )
        print("|---|---|---|---|---|")
        vq = {"num_vq_embeddings": 32, "continuous_fraction": 0.3}
        costs(
            "tokenizer",
            train_tokenizer,
            VQTrainingArguments(output_dir=str(folder / "tokenizer"), **common | vq),
        )
        gpt = {"visual_tokenizer_path": str(folder / "made/tokenizer"), "depth": 4, "sample_prompts": []}
        costs("GPT, depth 4", train_gpt, GPTTrainingArguments(output_dir=str(folder / "gpt"), **common | gpt))
        for command in ("train-tokenizer", "train"):
            found = []
            for number in range(3):
                trial = folder / f"{command}{number}"
                trial.mkdir()
                found.append(from_kill_to_step(trial, COMMANDS[command].replace("--max_steps 6 ", "")))
            print(f"{command}: {', '.join(f'{seconds:.1f}' for seconds in found)} s from the kill to the first step")


if __name__ == "__main__":
    main()
