"""Measures tokenizers or a model: `unitok-hf evaluate --checkpoint out/tokenizer --data_path pictures.parquet`.

Tokenizers, one or with `--compare` several, over every picture of the data: see `reconstruction`.

Model, over every stream of the data: bits per text token and bits per image token, that is the mean negative log2 of the
probability the model gave to what came; half of the streams have the image first, half the text.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..modeling_unitok.modeling_unitok import UniTokOutput
from .collators import StreamCollator, StreamDataset, read_rows, require_size, require_text
from .generate import load_model
from .reconstruction import evaluate_tokenizers, table


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
def stream_bits(
    model, streams: StreamDataset, collator: StreamCollator, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean negative log2-likelihood of streams, each of which is counted once, by one of the processes.

    Args:
        model: a UniTok model in evaluation mode, not wrapped for several processes.
        streams: all of them.
        collator: of their tokenizer.
        batch_size: streams at once in a process.
        accelerator: of the run; sums over the processes.

    Returns:
        `text_bits` and `image_bits` per token (nan where there is none), and `loss` in nats per token of either kind.
    """
    mine = Subset(streams, range(accelerator.process_index, len(streams), accelerator.num_processes))
    batches = DataLoader(mine, batch_size, collate_fn=collator)
    sums = torch.zeros(4, dtype=torch.float64)  # on the CPU: not every device has float64
    for batch in tqdm(batches, desc="evaluating", unit="batch", disable=not accelerator.is_local_main_process):
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
    compare: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of more tokenizers to measure, ours or stock VQModels that see pictures in [-1, 1]."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of the captions, for a model."})
    batch_size: int = field(default=64, metadata={"help": "Rows per batch."})
    seed: int = field(default=0, metadata={"help": "Decides which streams have the image first."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file to write the measures to."})


def evaluate(args: EvaluateArguments) -> dict:
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
        checkpoints = [args.checkpoint, *(args.compare or [])]
        found = evaluate_tokenizers(checkpoints, rows, args.data_path, args.batch_size, accelerator)
        shown = table(found)
    elif args.compare:
        raise ValueError(f"--compare is for tokenizers, but {args.checkpoint} is none")
    else:
        found = {"checkpoint": args.checkpoint, "data_path": args.data_path, "rows": len(rows)}
        found |= _evaluate_model(args, rows, accelerator)
        shown = json.dumps(found, indent=2)
    if accelerator.is_main_process:
        print(shown)
        if args.output_file is not None:
            Path(args.output_file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


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
    return stream_bits(model, streams, StreamCollator(tokenizer), args.batch_size, accelerator)
