"""Tokens per second of training a GPT: ours against plain `transformers.Trainer`, and what encoding and the cache cost.

python benchmarks/gpt_training.py

NanoChat of depth 4 (width 256) and 1,024 codes, batches of 32, AdamW, the same rows, tokens and vocabulary for all. Four
ways take turns, each time as a run of its own of which the first steps do not count; medians over the repetitions. A
token is one that is not padding.

- plain: `NanoChatForCausalLM` under `transformers.Trainer`, rows of ids as a tokenizer and an encoder left them
- ready: `GPTTrainer` on samples that are in memory already
- cache: `GPTTrainer` on the Parquet of `unitok-hf encode`
- fly:   `GPTTrainer` on pictures, encoded in every step

Without --data_path the rows are handwritten digits; the image tokenizer is that of `--preset` with random weights, which costs
the same.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import (
    DataCollatorForLanguageModeling,
    NanoChatConfig,
    NanoChatForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from unitok_hf import add_special_tokens
from unitok_hf.training.collators import EpochCallback, StreamCollator, StreamDataset, read_rows
from unitok_hf.training.data import PrepareDataArguments, prepare_data
from unitok_hf.training.gpt_trainer import GPTTrainer, GPTTrainingArguments, build_model, train_text_tokenizer
from unitok_hf.training.token_cache import EncodeArguments, encode
from unitok_hf.training.vq_trainer import VQTrainingArguments, build_training_model


SKIPPED = 3  # steps at the beginning that do not count


class Clock(TrainerCallback):
    """Time after each step."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **_):
        self.times.append(time.perf_counter())


class Counting:
    """A collator that remembers the tokens of each batch."""

    def __init__(self, collator):
        self.collator, self.tokens = collator, []

    def __call__(self, samples: list) -> dict[str, torch.Tensor]:
        batch = self.collator(samples)
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


class Ready(StreamDataset):
    """Samples made once."""

    def __init__(self, streams: StreamDataset):
        vars(self).update(vars(streams))
        self.samples = streams.__getitems__(list(range(len(streams))))

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [self.samples[index] for index in indices]


def speed(make_trainer, collator) -> float:
    """Tokens per second of a new run."""
    clock, counting = Clock(), Counting(collator)
    trainer = make_trainer(counting, clock)
    trainer.train()
    steps = slice(SKIPPED, len(clock.times))
    return sum(counting.tokens[steps]) / (clock.times[-1] - clock.times[SKIPPED - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data_path", default=None)
    parser.add_argument("--preset", default="configs/vq-64.yaml", help="YAML file with arguments of train-tokenizer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options, folder: Path) -> None:
    torch.manual_seed(0)
    if options.data_path is None:
        options.data_path = str(folder / "digits.parquet")
        prepare_data(
            PrepareDataArguments(
                builtin="digits",
                caption_template="a handwritten {label}",
                image_size=64,
                output_file=options.data_path,
            )
        )
    with open(options.preset, encoding="utf-8") as file:
        preset = VQTrainingArguments(data_path="", output_dir=str(folder / "vq"), **yaml.safe_load(file))
    vq_model = build_training_model(preset).vq.eval()
    torch.nn.init.normal_(vq_model.codebook)
    vq_model.save_pretrained(folder / "tokenizer")
    encode(EncodeArguments(str(folder / "tokenizer"), options.data_path, str(folder / "codes")))
    pictures, codes = read_rows(options.data_path), read_rows(str(folder / "codes"))
    tokenizer = add_special_tokens(train_text_tokenizer(pictures["text"], 4096))
    common = {
        "max_steps": SKIPPED + options.steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "output_dir": str(folder / "run"),
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = GPTTrainingArguments(data_path="", visual_tokenizer_path=str(folder / "tokenizer"), **common)
    set_seed(0)
    model, processor = build_model(args, tokenizer, vq_model)
    text = NanoChatConfig(**{**model.config.text_config.to_dict(), "vocab_size": model.config.vocab_size})

    def streams(rows) -> StreamDataset:
        n = model.vocabulary.codes_per_image
        return StreamDataset(rows, tokenizer, n, "text", 0.5, 0.1, 1024, "none", 0)

    samples = Ready(streams(codes))
    filled = []
    for sample in samples.samples:
        ids = torch.tensor(sample["input_ids"])
        ids[ids == model.config.image_token_id] = torch.tensor(sample["image_codes"]) + model.config.text_vocab_size
        filled.append({"input_ids": ids.tolist()})

    def plain(counting, clock) -> Trainer:
        set_seed(0)
        return Trainer(
            NanoChatForCausalLM(text),
            TrainingArguments(**common),
            data_collator=counting,
            train_dataset=filled,
            callbacks=[clock],
        )

    def ours(data: StreamDataset):
        def make(counting, clock) -> Trainer:
            set_seed(0)
            fresh, _ = build_model(args, tokenizer, vq_model)
            return GPTTrainer(
                [],
                model=fresh,
                args=args,
                data_collator=counting,
                train_dataset=data,
                processing_class=processor,
                callbacks=[EpochCallback(), clock],
            )

        return make

    ways = {
        "plain": (plain, DataCollatorForLanguageModeling(tokenizer, mlm=False)),
        "ready": (ours(samples), StreamCollator(tokenizer)),
        "cache": (ours(streams(codes)), StreamCollator(tokenizer)),
        "fly": (ours(streams(pictures)), StreamCollator(tokenizer)),
    }
    found = {name: [] for name in ways}
    for _ in range(options.repetitions):
        for name, way in ways.items():
            found[name].append(speed(*way))
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repetitions}")
    print("| way | tokens/s | |\n|---|---|---|")
    for name, other in (("plain", "plain"), ("ready", "plain"), ("cache", "ready"), ("fly", "cache")):
        cost = "" if name == other else f"{medians[name] / medians[other]:.3f} of {other}"
        print(f"| {name} | {medians[name]:.0f} | {cost} |")


if __name__ == "__main__":
    main()
