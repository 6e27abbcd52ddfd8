"""Kills a command at a chosen moment, starts it again, and compares what it leaves with what an undisturbed run leaves.

How a process dies, see `kill_child.work`:

    ("seconds", s)   SIGKILL from outside, s seconds after its start
    ("changes", n)   SIGKILL when it is about to open for writing, rename, remove or make its n-th file or folder
    ("bytes", n)     inside a write, when some file grows beyond n bytes

After the last death the same command must end well, without anybody's help, and the folder must then hold what the
undisturbed run left there: the same files, byte for byte, and no others.
"""

import atexit
import contextlib
import hashlib
import multiprocessing
import os
import random
import socket
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from conftest import CAPTIONS, TINY_VQ, draw
from loopback_hub import LoopbackHub
from transformers import NanoChatForCausalLM

from unitok_hf import (
    UniTokForConditionalGeneration,
    UniTokImageProcessor,
    UniTokProcessor,
    UniTokVQModel,
    add_special_tokens,
)
from unitok_hf.training.gpt_trainer import nanochat_config, train_text_tokenizer


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
TRAINING = (
    "--use_cpu true --disable_tqdm true --max_steps 6 --save_steps 2 --save_total_limit 2 --eval_strategy no "
    "--logging_steps 1 --batch_size 4 --data_path ../made/pictures.parquet --eval_data_path ../made/pictures.parquet"
)
WIDTHS = "--block_out_channels 32 32 32 --latent_channels 8 --num_vq_embeddings 32"
COMMANDS = {
    "train-tokenizer": f"train-tokenizer {TRAINING} {WIDTHS} --continuous_fraction 0.3 --output_dir out",
    "train": f"train {TRAINING} --depth 1 --hidden_size 64 --text_vocab_size 300 --max_length 48 "
    "--visual_tokenizer_path ../made/tokenizer --output_dir out",
    "prepare-data": "prepare-data --folder ../made/pictures --output_file out/a.parquet --max_rows_per_shard 3",
    "encode": "encode --checkpoint ../made/tokenizer --data_path ../made/pictures.parquet --output_dir out "
    "--rows_per_shard 2",
    "generate": "generate --checkpoint ../made/model --prompt circle --num_images 3 --device cpu --output_dir out",
    "push": "push ../made/model me/model",
}
TWO_RANKS = {
    f"{name}, one of two": COMMANDS[name].replace("_size 4", "_size 2") for name in ("train-tokenizer", "train")
}
COMMANDS |= TWO_RANKS
HAD_ENDED = ("already holds files of a finished run", "exists; move it away")  # it was killed when all was done


def make_materials(folder: Path) -> None:
    """Pictures, their Parquet file, an image tokenizer and a model, for every trial of a session."""
    (folder / "pictures").mkdir(parents=True)
    pictures = [draw(caption) for caption in CAPTIONS]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"pictures/{number}.png")
    (folder / "pictures/broken.png").write_bytes(b"\x89PNG")  # so that there is a list of what was left out
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "text": CAPTIONS}, features=features)
    rows.to_parquet(str(folder / "pictures.parquet"))
    torch.manual_seed(0)
    vq_model = UniTokVQModel(**TINY_VQ | {"num_vq_embeddings": 32})
    torch.nn.init.normal_(vq_model.codebook, std=0.3)
    vq_model.save_pretrained(folder / "tokenizer")
    tokenizer = add_special_tokens(train_text_tokenizer(CAPTIONS, 300))
    text_model = NanoChatForCausalLM(nanochat_config(1, 64, len(tokenizer), 48))
    model = UniTokForConditionalGeneration.from_parts(text_model, vq_model, tokenizer)
    model.save_pretrained(folder / "model")
    UniTokProcessor(UniTokImageProcessor(), tokenizer, num_image_tokens=16).save_pretrained(folder / "model")


def contents(folder: Path) -> dict[str, str]:
    """Digests of the files below a folder, and its empty folders."""
    found = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[path.relative_to(folder).as_posix()] = "empty"
    return found


@dataclass
class Trial:
    """What came of a command that was killed.

    Args:
        deaths: how it was to die, each time; and of these, how often it was quicker and had ended.
        trouble: what was wrong; "" if all was well.
        to_step: seconds from the start of the last process to its first training step, if it trained.
    """

    command: str
    deaths: list[tuple[str, float]]
    killed: int = 0
    trouble: str = ""
    to_step: float | None = None
    log: Path | None = None


@dataclass
class Arena:
    """A folder for trials, the server that forks processes, and a Hub.

    Args:
        folder: gets one folder per trial, and `made`, the materials.
    """

    folder: Path
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)
    trials: int = 0

    def __enter__(self) -> "Arena":
        self.closing = contextlib.ExitStack()
        self.hub = self.closing.enter_context(LoopbackHub())
        environment = self.hub.environment(self.folder / "home") | QUIET | {"PYTHONPATH": f"{HERE}:{ROOT}"}
        before = dict(os.environ)
        os.environ.clear()
        os.environ |= environment
        try:  # the server keeps the environment it is started in
            self.context = multiprocessing.get_context("forkserver")
            self.context.set_forkserver_preload(["kill_child"])
            process = self.context.Process(target=make_materials, args=(self.folder / "made",))
            process.start()
            process.join()
            assert process.exitcode == 0
        finally:
            os.environ.clear()
            os.environ |= before
        return self

    def __exit__(self, *error) -> None:
        self.closing.close()

    def start(self, command: str, folder: Path, die: tuple | None = None, victim: int = 0) -> list:
        """The process of a command, or the two of a run of two; the victim is to die."""
        from kill_child import work

        argv = COMMANDS[command].split()
        ranks = range(2) if command in TWO_RANKS else [None]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in ranks:
            environment = {}
            if rank is not None:
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            own = die if rank in (None, victim) else None
            log = f"{folder}.log{rank or ''}"
            process = self.context.Process(target=work, args=(argv, str(folder), log, own, environment))
            process.start()
            processes.append(process)
        return processes

    def run(self, command: str, folder: Path, die: tuple | None = None, victim: int = 0) -> list[int]:
        """Run a command, perhaps to its death; gives the exit codes. As torchrun does, ends the other of two."""
        folder.mkdir(exist_ok=True)
        for old in folder.parent.glob(f"{folder.name}.log*.step"):
            old.unlink()
        at_once = die if die and die[0] != "seconds" else None
        processes = self.start(command, folder, at_once, victim)
        if die and die[0] == "seconds":
            processes[victim].join(die[1])
            processes[victim].kill()
        for process in processes:
            process.join(None if die is None else 60)
            if die is not None and len(processes) == 2:
                for other in processes:
                    other.join(15)
                    if other.is_alive():
                        other.terminate()
                        other.join(15)
                        other.kill()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    def know(self, command: str) -> None:
        """Run a command undisturbed, once, for what it leaves and how long it takes."""
        if command in self.expected:
            return
        self.hub.repositories.clear()
        folder = self.folder / f"undisturbed {command}".replace(" ", "-").replace(",", "")
        began = time.monotonic()
        codes = self.run(command, folder)
        self.seconds[command] = time.monotonic() - began
        assert codes == [0] * len(codes), Path(f"{folder}.log").read_text()[-3000:]
        self.expected[command] = self.outcome(command, folder)
        self.changes[command] = int(Path(f"{folder}.log.changes").read_text())
        sizes = [path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file()]
        self.largest[command] = max(sizes, default=0)

    def outcome(self, command: str, folder: Path) -> dict[str, str]:
        """What a command has left: files and their digests."""
        if command != "push":
            return contents(folder / "out")
        repository = self.hub.repositories.get(("model", "me/model"))
        files = {} if repository is None else repository.files()
        return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    def death(self, command: str, chance: random.Random) -> tuple[str, float]:
        """A moment of the command's life."""
        kind = chance.choice(["seconds", "seconds", "changes", "changes", "bytes"])
        if kind == "changes" and self.changes[command]:
            return kind, chance.randint(1, self.changes[command])
        if kind == "bytes" and self.largest[command]:
            return kind, int(self.largest[command] ** chance.random())
        return "seconds", chance.random() * self.seconds[command]

    def trial(self, command: str, deaths: list[tuple[str, float]], victim: int = 0) -> Trial:
        """Kill a command as often as there are deaths, each time when it is started again; then let it live."""
        self.know(command)
        self.hub.repositories.clear()
        self.trials += 1
        folder = self.folder / f"trial{self.trials}"
        trial = Trial(command, deaths, log=Path(f"{folder}.log"))
        expected = self.expected[command]
        for death in deaths:
            codes = self.run(command, folder, death, victim)
            trial.killed += codes[victim] < 0
            half = self.half_written(command, folder)
            if half:
                trial.trouble = f"after {death}: {half}"
                return trial
        began = time.time()
        codes = self.run(command, folder)
        step = Path(f"{folder}.log.step")
        if step.is_file():
            trial.to_step = float(step.read_text()) - began
        text = trial.log.read_text(errors="replace")
        last = text.strip().splitlines()[-1] if text.strip() else ""
        found = self.outcome(command, folder)
        if codes != [0] * len(codes) and not any(message in last for message in HAD_ENDED):
            trial.trouble = f"the next start ended with {codes}: {last}"
        elif command == "generate":
            numbers = {name.split("/")[0] for name in found}
            wanted = {f"{number}/{name[4:]}": digest for number in numbers for name, digest in expected.items()}
            if found != wanted or not numbers:
                trial.trouble = f"{sorted(found)}"
        elif found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            trial.trouble = f"differs from the undisturbed run in {names}"
        return trial

    def half_written(self, command: str, folder: Path) -> str:
        """What of the finished files a death has spoiled: those under their final name are whole, or not there."""
        expected, found = self.expected[command], self.outcome(command, folder)
        if command == "push":
            return "" if set(found) <= {".gitattributes"} or found == expected else f"half pushed: {sorted(found)}"
        if command == "generate":
            found = {f"001/{name[4:]}": digest for name, digest in found.items() if not name.startswith(".")}
        spoiled = [
            name
            for name, digest in found.items()
            if name in expected and digest != expected[name] and not name.startswith("checkpoint-")
        ]
        return f"half written: {spoiled}" if spoiled else ""


@cache
def the_arena() -> Arena:
    """One arena for all tests of a session; it goes when they end."""
    folder = TemporaryDirectory(prefix="kill-")
    arena = Arena(Path(folder.name)).__enter__()
    atexit.register(folder.cleanup)
    atexit.register(arena.__exit__)
    return arena
