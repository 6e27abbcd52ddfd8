"""Trains on streamed rows and writes down which came: `python stream_of_ids.py ROWS OUT STEPS BATCH [CHECKPOINT]`.

OUT/ids-<rank>.json has the `text` of the rows of every batch of this process, a number each.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments

from unitok_hf.training.collators import EpochCallback, EpochDataset
from unitok_hf.training.parquet_rows import ParquetRows
from unitok_hf.training.runs import RunTrainer


class Numbers(EpochDataset):
    """Rows as the numbers they have."""

    def __getitem__(self, index: int) -> dict:
        return {"number": int(self.row(index)["text"])}


class Listening(nn.Module):
    """Remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def forward(self, number: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(number.tolist())
        return {"loss": (self.weight - number.float()).square().mean()}


def main(rows: str, out: str, steps: str, batch: str, checkpoint: str | None = None) -> None:
    args = TrainingArguments(
        out, max_steps=int(steps), per_device_train_batch_size=int(batch), use_cpu=True, save_steps=1,
        dataloader_num_workers=2, disable_tqdm=True, report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    model = Listening()
    data = Numbers(ParquetRows([Path(rows)], memory=2000).select_columns("text"), "none", 0)
    RunTrainer(model, args, train_dataset=data, callbacks=[EpochCallback()]).train(resume_from_checkpoint=checkpoint)
    (Path(out) / f"ids-{args.process_index}.json").write_text(json.dumps(model.seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
