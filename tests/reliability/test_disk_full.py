"""Full disks, folders that cannot be written, files that are gone or broken: one line with the path, and nothing lost.

When it is mended, the same command ends as if nothing had been. A small tmpfs stands for the disk where one can be mounted;
elsewhere those tests are skipped, and a limit on the size of a file stands for it.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from kill_trial import COMMANDS, contents, the_arena

from unitok_hf.training.runs import is_whole, last_checkpoint


@pytest.fixture(scope="module")
def arena():
    return the_arena()


@pytest.fixture
def folder(arena, tmp_path) -> Path:
    """The folder of a trial."""
    arena.trials += 1
    return arena.folder / f"disk{arena.trials}"


@pytest.fixture
def disk(folder):
    """A small disk at `folder/out`; call it with the arguments of `mount`."""
    (folder / "out").mkdir(parents=True)
    mounted = []

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder / "out")]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no tmpfs can be mounted here: {error}")
        mounted.append(True)

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder / "out")], check=True)


def refusal(arena, command: str, folder: Path, limit: int | None = None) -> str:
    """The line with which a command ends that cannot go on."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    assert arena.run(command, folder, limit and ("full", limit)) == [2], log.read_text()
    assert "Traceback" not in log.read_text()
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith(f"unitok-hf {command}: error: ")
    return line


SIZES = {"train-tokenizer": "7m", "train": "3m", "prepare-data": "8k", "encode": "8k", "generate": "16k"}


@pytest.mark.parametrize("command", SIZES)
def test_a_full_disk_is_one_line_and_more_room_is_all_it_takes(arena, folder, disk, command):
    arena.know(command)
    disk("-o", f"size={SIZES[command]}")
    line = refusal(arena, command, folder)
    assert " cannot be written, " in line
    left = contents(folder / "out")
    if command.startswith("train"):
        assert "out/checkpoint-" in line
        assert is_whole(last_checkpoint(folder / "out")) and not any(".saving" in name for name in left)
    else:
        assert left.items() <= arena.expected[command].items()  # whole files alone, of `encode` the first shards
        assert bool(left) == (command == "encode")
    disk("-o", "remount,size=100m")
    assert arena.run(command, folder) == [0]
    assert contents(folder / "out") == arena.expected[command]


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_of_it(arena, folder, share):
    """The tokenizer does not fit, the optimizer does not fit."""
    command = "train-tokenizer"
    arena.know(command)
    line = refusal(arena, command, folder, int(arena.largest[command] * share))
    assert "out/checkpoint-2 cannot be written" in line
    assert [path.name for path in (folder / "out").iterdir()] == ["run.json"]
    assert arena.run(command, folder) == [0]
    assert contents(folder / "out") == arena.expected[command]


@pytest.mark.parametrize("command", SIZES)
def test_a_folder_that_cannot_be_written_is_named(arena, folder, disk, command):
    arena.know(command)
    if os.geteuid():
        (folder / "out").chmod(0o555)
    else:  # who may write anywhere
        disk("-o", "ro")
    line = refusal(arena, command, folder)
    assert ("Read-only file system" in line or "Permission denied" in line) and "out/.saving-" in line


def test_what_was_removed_between_two_starts_is_named_and_can_be_put_back(arena, folder, monkeypatch):
    arena.know("train")
    folder.mkdir()
    shutil.copytree(arena.folder / "made", folder / "own")
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"].replace("../made/tokenizer", "own/tokenizer"))
    arena.run("train", folder, ("changes", arena.changes["train"] * 6 // 10))
    before = contents(folder / "out")
    (folder / "own/tokenizer").rename(folder / "own/elsewhere")
    assert "no image tokenizer at own/tokenizer" in refusal(arena, "train", folder)
    assert contents(folder / "out") == before
    (folder / "own/elsewhere").rename(folder / "own/tokenizer")
    newest = last_checkpoint(folder / "out")
    (newest / "optimizer.pt").unlink()
    assert arena.run("train", folder) == [0]
    assert f"out/{newest.name} is incomplete" in Path(f"{folder}.log").read_text()
    assert contents(folder / "out")["model.safetensors"] == arena.expected["train"]["model.safetensors"]


def test_a_shard_that_breaks_off_is_named_and_can_be_put_back(arena, folder, monkeypatch):
    table = pq.read_table(arena.folder / "made/pictures.parquet")
    (folder / "shards").mkdir(parents=True)
    for number in range(2):
        pq.write_table(table.slice(4 * number, 4), folder / f"shards/{number}.parquet")
    for command in ("train-tokenizer", "encode"):
        text = COMMANDS[command].replace("--data_path ../made/pictures.parquet", "--data_path shards")
        monkeypatch.setitem(COMMANDS, command, text.replace("--output_dir out", f"--output_dir out/{command}"))
    whole = (folder / "shards/1.parquet").read_bytes()
    (folder / "shards/1.parquet").write_bytes(whole[: len(whole) // 2])
    for command in ("train-tokenizer", "encode"):
        assert "shards/1.parquet" in refusal(arena, command, folder)
        assert contents(folder / "out") == {}
    (folder / "shards/1.parquet").write_bytes(whole)
    for command in ("train-tokenizer", "encode"):
        assert arena.run(command, folder) == [0]
    assert len(list((folder / "out/encode").iterdir())) == 4
