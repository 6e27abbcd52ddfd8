"""The folder of a training run: never overwritten by another run, continued by resuming, finished in one move.

output_dir/
    checkpoint-500/, checkpoint-1000/   what resuming needs
    samples/                            picture grids, one per evaluation
    config.json, *.safetensors, …       the finished model, there only when training has ended
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainingArguments


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run. `trainer_state.json` is written last: a run killed before it left a stump."""
    whole = [state.parent for state in Path(output_dir).glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder this run continues from; None for a new run.

    `--resume_from_checkpoint last` means the newest whole checkpoint in the output folder.

    Raises:
        ValueError: the run would write into a folder that holds another one; or there is nothing to resume.
    """
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    found = last_checkpoint(output_dir) if wanted == "last" else wanted
    if wanted is not None and (found is None or not (Path(found) / "trainer_state.json").is_file()):
        raise ValueError(f"there is no checkpoint to resume at {output_dir if wanted == 'last' else wanted}")
    goes_on_here = found is not None and Path(found).resolve().parent == output_dir.resolve()
    if not goes_on_here and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} already holds files; choose another --output_dir, "
            "or continue the run in it with --resume_from_checkpoint last"
        )
    return None if found is None else str(found)


def require_finite(terms: dict[str, torch.Tensor], step: int, output_dir: str) -> None:
    """Raises ValueError when the loss of the step after `step` is not finite, with all its terms and the way back."""
    if not torch.isfinite(terms["loss"]):
        values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
        saved = last_checkpoint(output_dir)
        raise ValueError(
            f"the loss is not finite at step {step + 1} ({values}); lower --learning_rate. "
            + (f"The last checkpoint is {saved}" if saved else "No checkpoint was written yet")
        )


def load_tensors(path: str | Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which must have the names and shapes of others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt, or of another run: the first tensor that differs is named.
    """
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or was cut short: {error}") from error
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} was written with other arguments: it differs in {name}, {shapes[0]} there and {shapes[1]} here"
            )
    return found


def save_arguments(args: TrainingArguments, folder: str | Path) -> None:
    """The arguments of the run as `training_args.json`."""
    (Path(folder) / "training_args.json").write_text(args.to_json_string(), encoding="utf-8")


def save_beside(output_dir: str, save: Callable[[str], object]) -> None:
    """Call `save` with an empty folder, then move each file it wrote into `output_dir`."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    beside = tempfile.mkdtemp(prefix=".saving-", dir=output_dir)
    try:
        save(beside)
        for file in sorted(Path(beside).iterdir()):
            os.replace(file, Path(output_dir) / file.name)
    finally:
        shutil.rmtree(beside)


def write_beside(path: Path, content: bytes) -> None:
    """Write a file in one move: whoever looks finds the old content or the new one, never a part."""
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(content)
    os.replace(beside, path)


def numbered_folder(parent: str | Path) -> Path:
    """A new empty folder `parent/001`, or the next free number, also when others ask at the same time."""
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        number = 1 + max((int(folder.name) for folder in parent.iterdir() if folder.name.isdigit()), default=0)
        folder = parent / f"{number:03d}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
