"""What `--torch_compile true` gives the tokenizer's training: steps per second, and how long compilation takes.

python benchmarks/compiled_training.py

The preset's network on random pictures, with the codebook in use; inductor, which needs a C++ compiler. Compilation is the
time that the first steps take beyond that of as many later ones. Both take turns; medians over the repetitions.
"""

import argparse
import statistics
import tempfile
import time

import torch
import yaml
from transformers import TrainerCallback

from unitok_hf.training.vq_trainer import VQTrainer, VQTrainingArguments, build_training_model


FIRST = 10  # steps in which everything is compiled, k-means included


class Clock(TrainerCallback):
    """Time after each step."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def on_step_end(self, args, state, control, **_):
        self.times.append(time.perf_counter())


def run(preset: dict, compiled: bool, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of compilation."""
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        arguments = VQTrainingArguments(
            data_path="", output_dir=folder, max_steps=FIRST + steps, continuous_fraction=0.0, eval_strategy="no",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, torch_compile=compiled,
            use_cpu=True, **preset,
        )  # fmt: skip
        torch.manual_seed(0)
        size = arguments.image_size
        pictures = torch.rand(arguments.per_device_train_batch_size * (FIRST + steps), 3, size, size) * 2 - 1
        clock = Clock()
        model = build_training_model(arguments)
        model.codebook_state.started.fill_(True)
        torch.nn.init.normal_(model.vq.codebook)
        trainer = VQTrainer(model, arguments, train_dataset=Pictures(pictures))
        trainer.add_callback(clock)
        clock.times = [time.perf_counter()]
        trainer.train()
    step = (clock.times[-1] - clock.times[FIRST]) / steps
    return step, clock.times[FIRST] - clock.times[0] - FIRST * step


class Pictures(torch.utils.data.Dataset):
    """Pixels that are in memory already."""

    epoch = 0

    def __init__(self, pictures: torch.Tensor):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.pictures[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="configs/vq-64.yaml")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with open(options.preset, encoding="utf-8") as file:
        preset = yaml.safe_load(file)
    found = {False: [], True: []}
    for _ in range(options.repetitions):
        for compiled in found:
            found[compiled].append(run(preset, compiled, options.steps))
    plain, compiled = (statistics.median(step for step, _ in found[kind]) for kind in (False, True))
    took = statistics.median(seconds for _, seconds in found[True])
    pays = took / (plain - compiled) if compiled < plain else float("inf")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.repetitions}, {options.preset}"
    )
    print(
        "| plain ms/step | compiled ms/step | compiled / plain | compilation s | pays after steps |\n|---|---|---|---|---|"
    )
    print(f"| {1000 * plain:.0f} | {1000 * compiled:.0f} | {compiled / plain:.2f} | {took:.0f} | {pays:.0f} |")


if __name__ == "__main__":
    main()
