"""What do a picture and a token cost, and what would a billion of them? The tables of `scale.md`.

python benchmarks/costs.py --data_path photos64.parquet

First what is measured here, on one thread, as time of the processor: real pictures, enlarged to 512 pixels as JPEG, go through
`prepare-data`, the reader, `encode_to_indices`, forward and backward of both trainings and drawing, for both sizes of picture
of `PRESETS`. Floating-point operations are counted by torch, which on a CPU leaves out attention. Weights are random, which
costs the same.

Then what follows for `--pictures` on a cluster, which the flags describe: operations at a share of the GPUs' peak, work of the
CPU at the speed of this machine's thread, bytes as measured; but those of codes by their number, as random weights do not use
all of them.
"""

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import NanoChatForCausalLM

from unitok_hf import UniTokVQModel, add_special_tokens
from unitok_hf.training.collators import PictureDataset
from unitok_hf.training.data import PrepareDataArguments, prepare_data
from unitok_hf.training.gpt_trainer import GPTTrainingArguments, build_model, nanochat_config, train_text_tokenizer
from unitok_hf.training.parquet_rows import ParquetRows
from unitok_hf.training.vq_trainer import VQTrainingArguments, build_training_model


PRESETS = {"configs/vq-64.yaml": 64, "configs/vq-256-f16-16k.yaml": 4}  # batches that a laptop can hold
SOURCE_SIDE = 512
TEXT_TOKENS = 20  # of a caption, and the four around a stream
MILLISECOND = 1e-3


@dataclass
class Costs:
    """Of a picture, or of a token; seconds of one thread."""

    tokens: int
    prepare: float
    source_bytes: float
    bytes: float
    read: float
    encode: float
    encode_flops: float
    codes: int
    train: float
    train_flops: float
    parameters: int

    @property
    def code_bytes(self) -> float:
        """Of a picture on the disk, without a few per cent for dictionary and lists: Parquet packs the bits of numbers."""
        return self.tokens * math.ceil(math.log2(self.codes)) / 8


def processor_time(way: Callable, repetitions: int = 3) -> float:
    """Seconds of the processor, the least of several."""
    found = []
    for _ in range(repetitions):
        begin = time.process_time()
        way()
        found.append(time.process_time() - begin)
    return min(found)


def operations(way: Callable) -> int:
    """Floating-point operations: two for each product that is added."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def costs_of_pictures(preset: str, batch: int, source: Path, work: Path) -> tuple[Costs, UniTokVQModel, list[str]]:
    """Measures one preset on the pictures of a folder; also returns its tokenizer and the captions."""
    settings = yaml.safe_load(Path(preset).read_text(encoding="utf-8"))
    settings |= {"bf16": False, "perceptual_weight": 0.0, "dataloader_num_workers": 0}  # what a CPU has
    args = VQTrainingArguments(data_path="", output_dir=str(work), report_to="none", use_cpu=True, **settings)
    torch.manual_seed(0)
    training_model = build_training_model(args)
    vq_model = training_model.vq
    torch.nn.init.normal_(vq_model.codebook)
    data = work / "data/a.parquet"
    prepared = PrepareDataArguments(folder=str(source), output_file=str(data), image_size=args.image_size)
    files = list(source.glob("*.jpg"))
    prepare = processor_time(lambda: prepare_data(prepared), 1) / len(files)
    rows = ParquetRows([data])
    pictures = PictureDataset(rows, "none", 0)
    read = processor_time(lambda: [pictures[index] for index in range(len(pictures))]) / len(pictures)
    pixels = torch.stack([pictures[index] for index in range(batch)])
    training_model.train()

    def encoded() -> None:
        with torch.no_grad():
            vq_model.eval().encode_to_indices(pixels)

    def trained() -> None:
        vq_model.train()
        training_model(pixels)["loss"].backward()

    trained()
    found = Costs(
        tokens=math.prod(vq_model.grid(args.image_size, args.image_size)),
        prepare=prepare,
        source_bytes=sum(file.stat().st_size for file in files) / len(files),
        bytes=data.stat().st_size / len(rows),
        read=read,
        encode=processor_time(encoded) / batch,
        encode_flops=operations(encoded) / batch,
        codes=len(vq_model.codebook),
        train=processor_time(trained) / batch,
        train_flops=operations(trained) / batch,
        parameters=sum(parameter.numel() for parameter in vq_model.parameters()),
    )
    return found, vq_model, [text for text in rows["text"] if text]


def gpt(vq_model: UniTokVQModel, texts: list[str], tokens: int):
    """A fresh model of depth 4 for streams of so many tokens, and its processor."""
    tokenizer = add_special_tokens(train_text_tokenizer(texts, 4096))
    with tempfile.TemporaryDirectory() as folder:
        args = GPTTrainingArguments(
            data_path="", output_dir=folder, visual_tokenizer_path="x", depth=4, max_length=tokens, use_cpu=True
        )
        return build_model(args, tokenizer, vq_model)


def operations_per_token(depth: int, vocabulary: int, tokens: int) -> tuple[float, int]:
    """Of a training step, by the usual formula, and parameters.

    Six for each weight of a matrix, the embedding being looked up, and attention (arXiv:2204.02311, appendix B).
    """
    with torch.device("meta"):
        model = NanoChatForCausalLM(nanochat_config(depth, None, vocabulary, tokens))
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)
    config, embedding = model.config, model.get_input_embeddings().weight.numel()
    attention = 12 * config.num_hidden_layers * config.hidden_size * tokens
    return 6 * (matrices - embedding) + attention, sum(weight.numel() for weight in model.parameters())


def measure_gpt(model, processor, tokens: int, batch: int = 8) -> tuple[float, float, float]:
    """Seconds per token of a training step, its operations as three times those of the forward pass, and drawing."""
    n = model.vocabulary.codes_per_image
    stream = torch.randint(model.config.text_vocab_size, model.config.vocab_size, (batch, tokens))
    stream[:, 0] = model.config.bos_token_id
    labels = stream.clone()

    def trained() -> None:
        model.train()(input_ids=stream, labels=labels).loss.backward()

    def forward() -> None:
        with torch.no_grad():
            model.eval()(input_ids=stream)

    inputs = processor(text=["a red circle"] * batch, generation_mode="image", return_tensors="pt")

    def drawn() -> None:
        with torch.no_grad():
            model.eval().generate(**inputs, generation_mode="image", do_sample=True)

    trained()
    training = processor_time(trained) / (batch * tokens)
    return training, 3 * operations(forward) / (batch * tokens), processor_time(drawn) / (batch * n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--pictures", type=float, default=1e9)
    parser.add_argument("--depth", type=int, default=24, help="of the GPT on the cluster")
    parser.add_argument("--text_vocabulary", type=int, default=65_536, help="of that GPT")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--gpus", type=int, default=8, help="of a node")
    parser.add_argument("--cores", type=int, default=96, help="of a node")
    parser.add_argument("--peak", type=float, default=989e12, help="operations per second of a GPU, bf16")
    parser.add_argument("--convolutions", type=float, default=0.2, help="share of the peak that a tokenizer reaches")
    parser.add_argument("--transformer", type=float, default=0.4, help="share of the peak that a GPT reaches")
    parser.add_argument("--disk", type=float, default=5e9, help="bytes per second that a node reads and writes")
    parser.add_argument("--tokenizer_steps", type=int, default=400_000)
    parser.add_argument("--tokenizer_batch", type=int, default=256)
    parser.add_argument("--gpt_batch", type=int, default=4096, help="streams of a step of the GPT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    print(f"torch {torch.__version__}, one thread\n")
    print("| | 64x64, 16 tokens | 256x256, 256 tokens |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        rows = datasets.load_dataset("parquet", data_files=options.data_path, split="train").select(
            range(options.rows)
        )
        with (source / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text"])
            for number, row in enumerate(rows):
                large = row["image"].convert("RGB").resize((SOURCE_SIDE, SOURCE_SIDE))
                large.save(source / f"{number}.jpg", quality=90)
                table.writerow([f"{number}.jpg", row["text"]])
        found = {}
        for preset, batch in PRESETS.items():
            work = Path(folder) / Path(preset).stem
            costs, vq_model, texts = costs_of_pictures(preset, batch, source, work)
            length = costs.tokens + 4 + TEXT_TOKENS
            model, processor = gpt(vq_model, texts, length)
            formula, _ = operations_per_token(4, model.config.vocab_size, length)
            found[preset] = costs, length, *measure_gpt(model, processor, length), formula
        report_measured(found)
        costs, length, *_ = found["configs/vq-256-f16-16k.yaml"]
        report_cluster(options, costs, length)


def report_measured(found: dict) -> None:
    def line(what: str, values: Callable) -> None:
        print(f"| {what} | {' | '.join(values(*of_preset) for of_preset in found.values())} |")

    line("prepare-data of a 512x512 JPEG, ms", lambda costs, *_: f"{costs.prepare / MILLISECOND:.1f}")
    line("its bytes, before and after", lambda costs, *_: f"{costs.source_bytes:,.0f}, {costs.bytes:,.0f}")
    line("read and decode a row, ms", lambda costs, *_: f"{costs.read / MILLISECOND:.2f}")
    line("encode, ms", lambda costs, *_: f"{costs.encode / MILLISECOND:.1f}")
    line("encode, GFLOP", lambda costs, *_: f"{costs.encode_flops / 1e9:.2f}")
    line("codes on disk, bytes", lambda costs, *_: f"{costs.code_bytes:.0f}")
    line("train the tokenizer, ms per picture", lambda costs, *_: f"{costs.train / MILLISECOND:.0f}")
    line("train the tokenizer, GFLOP per picture", lambda costs, *_: f"{costs.train_flops / 1e9:.2f}")
    line("parameters of the tokenizer, million", lambda costs, *_: f"{costs.parameters / 1e6:.1f}")
    line("train a GPT of depth 4, ms per token", lambda *f: f"{f[2] / MILLISECOND:.3f}")
    line("train it, MFLOP per token, three times the forward pass", lambda *f: f"{f[3] / 1e6:.1f}")
    line("train it, MFLOP per token, by formula", lambda *f: f"{f[5] / 1e6:.1f}")
    line("draw, ms per token, batches of 8", lambda *f: f"{f[4] / MILLISECOND:.2f}")


def report_cluster(options: argparse.Namespace, costs: Costs, length: int) -> None:
    """What so many pictures of 256x256 cost on the cluster: hours, and bytes on the disk and between machines."""
    pictures, hour, terabyte = options.pictures, 3600, 1e12
    cores, gpus = options.nodes * options.cores, options.nodes * options.gpus
    disk = options.nodes * options.disk
    per_token, weights = operations_per_token(options.depth, options.text_vocabulary + costs.codes, length)

    def hours(work: float, flops: float, share: float, moved: float) -> list[float]:
        return [work / cores / hour, flops / (gpus * options.peak * share) / hour, moved / disk / hour]

    seen = options.tokenizer_steps * options.tokenizer_batch
    steps = pictures / options.gpt_batch
    tokens = pictures * length
    kept, moved = pictures * costs.bytes, pictures * costs.source_bytes
    codes = pictures * (costs.code_bytes + 4 * TEXT_TOKENS)
    table = {
        "prepare-data": (hours(pictures * costs.prepare, 0, 1, moved + kept), kept, 0),
        "train-tokenizer": (
            hours(seen * costs.read, seen * costs.train_flops, options.convolutions, seen * costs.bytes),
            16 * costs.parameters,  # fp32: weights, their average, two moments of AdamW
            options.tokenizer_steps * 8 * costs.parameters,
        ),
        "encode": (
            hours(pictures * costs.read, pictures * costs.encode_flops, options.convolutions, kept + codes),
            codes,
            0,
        ),
        "train": (
            hours(0, tokens * per_token, options.transformer, codes),
            12 * weights,  # fp32: weights, two moments of AdamW
            steps * 8 * weights,
        ),
    }
    print(f"\n{pictures:,.0f} pictures of 256x256, {tokens:.2e} tokens; GPT of depth {options.depth}, ", end="")
    print(f"{weights / 1e9:.2f} billion parameters; {options.nodes} nodes, {gpus} GPUs, {cores} cores\n")
    print("| step | hours of the cores | hours of the GPUs | hours of the disks | kept, TB | sent by each GPU, TB |")
    print("|---|---|---|---|---|---|")
    for step, (times, stored, sent) in table.items():
        print(
            f"| {step} | {' | '.join(f'{value:.2f}' for value in times)} | {stored / terabyte:.3f} | {sent / terabyte:.1f} |"
        )


if __name__ == "__main__":
    main()
