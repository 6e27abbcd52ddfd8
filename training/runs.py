"""The folder of a training run: never overwritten by another run, continued by the same command, finished in one move.

output_dir/
    run.json                            the arguments of the run; it goes when the run is finished
    checkpoint-500/, checkpoint-1000/   what resuming needs
    samples/                            picture grids, one per evaluation
    config.json, *.safetensors, …       the finished model, there only when training has ended

A process may be killed at any moment, a disk may be full. Nothing half done is ever taken for done:

- what is not finished is in a hidden folder `.saving-…` beside its place, and is moved there as the last act (`folder_beside`).
  That folder is locked as long as its process lives; the next one on the same host removes those that nobody holds
- a checkpoint is whole when its manifest and, written last, `trainer_state.json` are there, and every file of the manifest is
  as long as it says. Others are passed over, named and removed; this also covers what was being deleted
- the command of a run that is not finished continues it, if its arguments and the number of processes are the same. One
  process at a time: the folder is locked, too

SIGTERM and SIGINT end a run after the step at hand with a checkpoint; a second one, seconds later, ends it at once. transformers'
`enable_jit_checkpoint` is not used: it knows SIGTERM alone, waits three seconds, saves before a step is over, and returns as
if training had ended.
"""

import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from .parquet_rows import ParquetRows, WindowSampler


try:
    import fcntl
except ImportError:  # Windows: without locks, what killed processes left is not removed
    fcntl = None


logger = logging.getLogger(__name__)

RUN = "run.json"
MANIFEST = "manifest.json"
STATE = "trainer_state.json"
BESIDE = ".saving-"
# locks hold within a host: on a shared disk, each removes its own leftovers
HOST = re.sub(r"\W", "_", platform.node())
IMPATIENCE = 2.0  # seconds after which a second signal ends a run at once
NOT_COMPARED = {"output_dir", "resume_from_checkpoint", "local_rank"}


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint is there. `trainer_state.json` is written last, and no part of it is JSON."""
    try:
        json.loads((checkpoint / STATE).read_bytes())
        sizes = json.loads((checkpoint / MANIFEST).read_bytes())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError):
        return False


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by step."""
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in Path(output_dir).glob("checkpoint-*")}
    return sorted((folder for folder in steps if steps[folder].isdigit()), key=lambda folder: int(steps[folder]))


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next((folder for folder in reversed(checkpoints(output_dir)) if is_whole(folder)), None)


def described(args: TrainingArguments) -> dict[str, object]:
    """What a run must have in common with the one it continues: the arguments and the number of processes."""
    values = {name: value for name, value in json.loads(args.to_json_string()).items() if name not in NOT_COMPARED}
    return values | {"number of processes": args.world_size}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint folder this run continues from; None for a new run.

    A run in the output folder that was begun with the same arguments and is not finished is continued.
    `--resume_from_checkpoint last` means the newest whole checkpoint in the output folder, whatever the arguments.

    Raises:
        ValueError: the run would write into a folder that holds another one; or there is nothing to resume.
    """
    output_dir = Path(args.output_dir)
    wanted = args.resume_from_checkpoint
    found = last_checkpoint(output_dir) if wanted == "last" else wanted
    if wanted is not None and (found is None or not (Path(found) / STATE).is_file()):
        raise ValueError(f"there is no checkpoint to resume at {output_dir if wanted == 'last' else wanted}")
    goes_on_here = found is not None and Path(found).resolve().parent == output_dir.resolve()
    there = {entry.name for entry in output_dir.iterdir()} if output_dir.is_dir() else set()
    there = {name for name in there if not name.startswith(BESIDE)}
    if goes_on_here or not there:
        return None if found is None else str(found)
    way_out = "choose another --output_dir, or continue the run in it with --resume_from_checkpoint last"
    if RUN not in there:
        finished = " of a finished run" if "training_args.json" in there else ""
        raise ValueError(f"{output_dir} already holds files{finished}; {way_out}")
    ours = described(args)
    theirs = json.loads((output_dir / RUN).read_text(encoding="utf-8"))
    differing = [name for name in ours if name not in theirs or theirs[name] != ours[name]]
    if differing:
        name = differing[0]
        values = f"{name} was {json.dumps(theirs.get(name))} and is now {json.dumps(ours[name])}"
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise ValueError(f"{output_dir} already holds a run with other arguments: {values}{more}; {way_out}")
    found = last_checkpoint(output_dir) or found
    return None if found is None else str(found)


class Run:
    """A training run and its folder. Leaving the context without an error means that the run is finished.

        with Run(args) as run:
            …                   whatever may be refused
            run.begin()         from here on the folder is ours
            run.train(trainer)
            …                   saves the model

    Raises:
        ValueError: as `checkpoint_to_resume`.
    """

    def __init__(self, args: TrainingArguments):
        checkpoint_to_resume(args)
        self.args = args
        self.folder = Path(args.output_dir)
        self.checkpoint: str | None = None
        self.held = ExitStack()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error, *_) -> None:
        with self.held:
            if error is None and self.args.should_save:
                (self.folder / RUN).unlink(missing_ok=True)

    def begin(self) -> None:
        """Take the folder, tidy up what killed processes left in it, and write down what the run is.

        Raises:
            ValueError: another process is at work in the folder; or as `checkpoint_to_resume`.
            OSError: the folder cannot be written.
        """
        with self.args.main_process_first(local=False):
            if self.args.should_save:
                self.folder.mkdir(parents=True, exist_ok=True)
                if self.held.enter_context(locked(self.folder)) is False:
                    raise ValueError(f"another process is training in {self.folder}; choose another --output_dir")
                self.checkpoint = checkpoint_to_resume(self.args)
                remove_leftovers(self.folder)
                self._tidy_checkpoints()
                if self.checkpoint is not None:
                    logger.warning("continuing from %s", self.checkpoint)
                write_beside(self.folder / RUN, json.dumps(described(self.args), indent=2).encode())
        # what one process sees of a shared disk, another may not see yet
        [self.checkpoint] = broadcast_object_list([self.checkpoint])

    def _tidy_checkpoints(self) -> None:
        """Remove what a killed process did not finish to write, or to delete."""
        if not (self.folder / RUN).is_file() or self.args.save_only_model:
            return
        for folder in checkpoints(self.folder):
            if not is_whole(folder) and folder.resolve() != Path(self.checkpoint or "").resolve():
                logger.warning("%s is incomplete: it is passed over, and removed", folder)
                shutil.rmtree(folder)
        if self.checkpoint is not None and self.checkpoint == str(last_checkpoint(self.folder)):
            best = json.loads((Path(self.checkpoint) / STATE).read_bytes()).get("best_model_checkpoint")
            rotate_checkpoints(str(self.folder), self.args.save_total_limit, best)

    def train(self, trainer: Trainer) -> None:
        """Train, from the checkpoint if there is one; a signal ends it as the module says.

        Raises:
            SystemExit, KeyboardInterrupt: it was SIGTERM, or SIGINT.
        """
        leave = LeaveCallback()
        trainer.add_callback(leave)
        with leave.listening():
            trainer.train(resume_from_checkpoint=self.checkpoint)
        if leave.signal:
            leave.leave(self.args, "stopped after the last step")


class LeaveCallback(TrainerCallback):
    """Ends training after the step in which a signal comes, with a checkpoint. Every process of a run learns of it."""

    def __init__(self):
        self.signal, self.since = 0, 0.0
        self.leaving = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are only noted inside; one that comes seconds after the first acts as it would without us.

        They do not reach processes that are forked inside: the step at hand needs the workers of its data loader. Workers
        that are spawned are not spared, and a run whose workers end goes back to its last checkpoint.
        """
        if threading.current_thread() is not threading.main_thread():  # the only one that can
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame) -> None:
            if self.signal and time.monotonic() - self.since > IMPATIENCE:
                restore()
                os.kill(os.getpid(), number)
            elif not self.signal:  # launchers that were signalled themselves send it once more
                self.signal, self.since = number, time.monotonic()

        for number in before:
            signal.signal(number, note)
        LISTENING.append(self)
        try:
            yield
        finally:
            LISTENING.remove(self)
            restore()

    def on_step_end(self, args, state, control, **_):
        if args.world_size > 1:
            seen = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            self.signal = int(seen)
        if self.signal:
            control.should_save = True
            self.leaving = True

    def on_save(self, args, state, control, **_):
        if self.leaving:
            self.leave(args, f"saved {Path(args.output_dir) / f'checkpoint-{state.global_step}'}")

    def leave(self, args: TrainingArguments, what: str) -> None:
        """Say what was done, and end the process."""
        if args.process_index == 0:
            print(
                f"{signal.Signals(self.signal).name}: {what}; the same command continues from there", file=sys.stderr
            )
        raise KeyboardInterrupt if self.signal == signal.SIGINT else SystemExit(128 + self.signal)


class RunTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints say whether they are whole, and which shares a run only when finished.

    Rows that are streamed come in windows, see `parquet_rows`.

    Raises:
        ValueError: FSDP is asked for.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError(
                "FSDP splits the model, which this training evaluates, draws with and saves on one process; "
                "use configs/accelerate-ddp.yaml, or FSDP in a loop of your own"
            )

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler:
        if isinstance(self.train_dataset.rows, ParquetRows):
            return WindowSampler(self.train_dataset, self._train_batch_size * self.args.world_size)
        return super()._get_train_sampler(train_dataset)

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)  # of a run that was sent back to an earlier checkpoint
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save and not is_whole(folder):  # what is left of it is of no use, but takes place
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        """The last files but `trainer_state.json`: when every process has written its own, they are counted."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            files = [path for path in Path(output_dir).rglob("*") if path.is_file() and path.name != MANIFEST]
            sizes = {path.relative_to(output_dir).as_posix(): path.stat().st_size for path in sorted(files)}
            (Path(output_dir) / MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a run is shared when it is finished, see `push_run`."""


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


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Has an error of the disk name the path that was to be written; of torch and safetensors, it is none of `OSError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno is None):
            raise
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_CANNOT_WRITE):
            raise
        there = next(parent for parent in (Path(path), *Path(path).absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise OSError(f"{path} cannot be written, {free:,.1f} MB are free there: {error}") from error


TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def locked(folder: Path) -> Iterator[bool | None]:
    """Lock a folder until the context or the process ends.

    Returns:
        True; False if another process has it; None where the platform or the file system has no locks.

    Raises:
        FileNotFoundError: it is not there.
    """
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    HELD.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except OSError:
            ours = None
        yield ours
    finally:
        HELD.discard(descriptor)
        os.close(descriptor)


HELD: set[int] = set()
LISTENING: list[LeaveCallback] = []
MASKS: list[set[signal.Signals]] = []


def before_fork() -> None:
    """Block the signals that are listened for; a child begins with what is blocked."""
    if LISTENING:
        MASKS.append(signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT)))


def after_fork() -> None:
    """Let the parent have them again."""
    if MASKS:
        signal.pthread_sigmask(signal.SIG_SETMASK, MASKS.pop())


if fcntl is not None:
    # a worker of a data loader hears no signal of ours; it may outlive us by seconds, and holds nothing
    os.register_at_fork(
        before=before_fork,
        after_in_parent=after_fork,
        after_in_child=lambda: [os.close(HELD.pop()) for _ in range(len(HELD))],
    )


def remove_leftovers(parent: Path) -> None:
    """Remove the hidden folders of `folder_beside` whose process is dead."""
    for left in parent.glob(f"{BESIDE}{HOST}-*"):
        with suppress(FileNotFoundError), locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def folder_beside(parent: str | Path) -> Iterator[Path]:
    """A new hidden folder in `parent`, for what is not finished; move it or its files where they belong.

    Raises:
        OSError: `parent` or what is in it cannot be written; names a path.
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    while True:
        beside = parent / f"{BESIDE}{HOST}-{secrets.token_hex(4)}"
        beside.mkdir()
        with ExitStack() as held:
            try:
                ours = held.enter_context(locked(beside))
            except FileNotFoundError:
                continue
            if ours is False or not beside.exists():  # somebody who tidies up was quicker than our lock
                continue
            try:
                with writing(parent):
                    yield beside
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            return


def save_beside(output_dir: str | Path, save: Callable[[str], object]) -> None:
    """Call `save` with an empty folder, then move each file it wrote into `output_dir`; config.json comes last."""
    with folder_beside(output_dir) as beside:
        save(str(beside))
        for file in sorted(beside.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
            os.replace(file, Path(output_dir) / file.name)


def write_beside(path: Path, content: bytes) -> None:
    """Write a file in one move: whoever looks finds the old content or the new one, never a part."""
    save_beside(path.parent, lambda folder: (Path(folder) / path.name).write_bytes(content))


def take_number(folder: Path) -> Path:
    """Rename a folder to `001` or the next free number beside it, also when others do so at the same time."""
    while True:
        number = 1 + max((int(other.name) for other in folder.parent.iterdir() if other.name.isdigit()), default=0)
        numbered = folder.with_name(f"{number:03d}")
        try:
            return folder.rename(numbered)
        except OSError:
            if not numbered.exists():
                raise
