"""What runs in the process that is killed: a command of `unitok-hf`, and what makes it die.

The module is imported once by a server that forks (`multiprocessing`'s forkserver): a command then starts with everything
imported, in a process of its own that has done nothing yet.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from unitok_hf.training import data, evaluation, generate, gpt_trainer, push, runs, token_cache, vq_trainer  # noqa: F401
from unitok_hf_cli import main


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def work(argv: list[str], folder: str, log: str, die: tuple[str, int] | None, environment: dict[str, str]) -> None:
    """Run a command in a folder.

    Args:
        log: receives what it prints; `log`.step the time of the first training step, `log`.changes how often the process
            was about to change something below the folder.
        die: ("changes", n), SIGKILL before the n-th such change; ("bytes", n), death inside the write by which a file grows
            beyond n bytes; ("full", n), such a write fails as it does on a full disk. None: it lives.
    """
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    data.WORKERS = 1  # the same order of changes every time
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    kind, number = die or (None, None)
    if kind in ("bytes", "full"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "bytes" else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            if isinstance(arguments[0], (str, bytes, os.PathLike)):
                path = os.path.abspath(os.fsdecode(arguments[0]))
                if path.startswith(folder):
                    count += 1
                    if kind == "changes" and count == number:
                        os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    first = runs.LeaveCallback.on_step_end

    def on_step_end(self, *args, **kwargs):
        if not os.path.exists(f"{log}.step"):
            with open(f"{log}.step", "w") as file:
                file.write(str(time.time()))
        return first(self, *args, **kwargs)

    runs.LeaveCallback.on_step_end = on_step_end
    try:
        main(argv)
    finally:
        with open(f"{log}.changes", "w") as file:
            file.write(str(count))
