"""Commands that are killed at any moment: the same command goes on by itself, and ends with the same bytes.

A few deaths each; `kill_at_random.py --times 50` is the same at random, and many times.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import CLI, ROOT, flags
from kill_trial import COMMANDS, TWO_RANKS, contents, the_arena
from transformers import TrainingArguments

from unitok_hf.training.runs import (
    HOST,
    MANIFEST,
    RUN,
    Run,
    checkpoint_to_resume,
    folder_beside,
    is_whole,
    last_checkpoint,
)


@pytest.fixture(scope="module")
def arena():
    return the_arena()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TWO_RANKS])
def test_whatever_a_kill_interrupts_the_next_start_finishes(arena, command):
    """At changes of the file system early and late, and inside a write while it goes on."""
    arena.know(command)
    changes, largest, seconds = arena.changes[command], arena.largest[command], arena.seconds[command]
    trials = [
        [
            ("changes", max(1, changes * 6 // 10)),
            ("bytes", largest * 6 // 10) if largest else ("seconds", seconds / 2),
        ],
        [("changes", max(1, changes * 97 // 100))],
    ]
    found = [arena.trial(command, deaths) for deaths in trials]
    assert [trial.trouble for trial in found] == ["", ""], "\n".join(trial.log.read_text() for trial in found)
    assert sum(trial.killed for trial in found) >= 2


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on(arena):
    command = "train-tokenizer, one of two"
    arena.know(command)
    trial = arena.trial(command, [("changes", arena.changes[command] * 6 // 10)])
    assert (trial.trouble, trial.killed) == ("", 1), trial.log.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_a_message(arena, number, code):
    """At the first step: the checkpoint is one that the schedule does not have."""
    arena.know("train")
    folder = arena.folder / f"signal{number}"
    folder.mkdir()
    [process] = arena.start("train", folder)
    while not Path(f"{folder}.log.step").exists():
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    saved = last_checkpoint(folder / "out")
    message = f"{signal.Signals(number).name}: saved out/{saved.name}; the same command continues from there"
    assert message in Path(f"{folder}.log").read_text()
    assert not (folder / "out/model.safetensors").exists()
    assert arena.run("train", folder) == [0]
    assert f"continuing from out/{saved.name}" in Path(f"{folder}.log").read_text()
    found, expected = contents(folder / "out"), arena.expected["train"]
    assert {name: found[name] for name in expected if "checkpoint-2" not in name} == {
        name: digest for name, digest in expected.items() if "checkpoint-2" not in name
    }


def test_a_signal_to_all_processes_of_a_run_leaves_the_step_its_workers(parquet, tmp_path):
    """As a terminal or a cluster sends it: to data loader workers, too, whose samples the step at hand waits for."""
    options = {"data_path": parquet, "eval_data_path": parquet, "output_dir": tmp_path / "run", "max_steps": 100_000}
    options |= {"dataloader_num_workers": 2, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"block_out_channels": [32, 32, 32], "latent_channels": 8, "num_vq_embeddings": 16, "batch_size": 2}
    command = [sys.executable, "-c", CLI, "train-tokenizer", *flags(options | {"disable_tqdm": True, "use_cpu": True})]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        while "'loss'" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        assert len(workers) >= 2
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, (tmp_path / "log").read_text()
    finally:
        process.kill()
    written = (tmp_path / "log").read_text()
    saved = last_checkpoint(tmp_path / "run")
    assert f"SIGTERM: saved {saved}; the same command continues from there" in written
    assert "Traceback" not in written
    psutil.wait_procs(workers, 10)
    assert not any(worker.is_running() for worker in workers)


def test_other_arguments_are_refused_with_what_differs(arena, monkeypatch):
    arena.know("train")
    folder = arena.folder / "others"
    arena.run("train", folder, ("changes", arena.changes["train"] * 6 // 10))
    before = contents(folder / "out")
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"].replace("--max_steps 6", "--max_steps 7"))
    assert arena.run("train", folder) == [2]
    assert "out already holds a run with other arguments: max_steps was 6 and is now 7" in (
        Path(f"{folder}.log").read_text()
    )
    assert contents(folder / "out") == before


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)


def checkpoint(folder: Path) -> Path:
    """A whole one, as `RunTrainer` leaves it."""
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"12345")
    (folder / MANIFEST).write_text('{"optimizer.pt": 5}')
    (folder / "trainer_state.json").write_text("{}\n")
    return folder


@pytest.mark.parametrize("lacking", ["optimizer.pt", MANIFEST, "trainer_state.json"])
def test_a_checkpoint_that_lacks_anything_is_not_whole(tmp_path, lacking):
    folder = checkpoint(tmp_path / "checkpoint-5")
    assert is_whole(folder)
    (folder / lacking).write_bytes((folder / lacking).read_bytes()[:-3])
    assert not is_whole(folder)
    (folder / lacking).unlink()
    assert not is_whole(folder)


def test_incomplete_checkpoints_are_named_and_removed(args, caplog):
    out = Path(args.output_dir)
    with pytest.raises(ZeroDivisionError), Run(args) as run:
        run.begin()
        for step in (5, 20, 100):
            checkpoint(out / f"checkpoint-{step}")
        (out / "checkpoint-100/trainer_state.json").unlink()  # the process died while writing it
        (out / "checkpoint-5/optimizer.pt").unlink()  # … while deleting it
        raise ZeroDivisionError
    with Run(args) as run:
        run.begin()
        assert run.checkpoint == str(out / "checkpoint-20")
    assert [folder.name for folder in out.iterdir()] == ["checkpoint-20"]
    for step in (5, 100):
        assert f"checkpoint-{step} is incomplete: it is passed over, and removed" in caplog.text


def test_checkpoints_from_before_there_were_manifests_can_be_named_and_are_kept(args):
    out = Path(args.output_dir)
    for step in (5, 20):
        (checkpoint(out / f"checkpoint-{step}") / MANIFEST).unlink()
    args.resume_from_checkpoint = str(out / "checkpoint-5")
    with Run(args) as run:
        run.begin()
        assert run.checkpoint == str(out / "checkpoint-5")
    assert len(list(out.iterdir())) == 2


def test_a_folder_is_of_one_process_at_a_time(args):
    with Run(args) as first:
        first.begin()
        with pytest.raises(ValueError, match="another process is training in"), Run(args) as second:
            second.begin()
        assert (Path(args.output_dir) / RUN).is_file()
    assert not (Path(args.output_dir) / RUN).exists()


def test_the_folder_of_a_finished_run_is_refused(args):
    with Run(args) as run:
        run.begin()
        (Path(args.output_dir) / "training_args.json").write_text(args.to_json_string())
    with pytest.raises(ValueError, match="already holds files of a finished run"):
        checkpoint_to_resume(args)


def test_the_number_of_processes_is_one_of_the_arguments(args):
    with pytest.raises(ZeroDivisionError), Run(args) as run:
        run.begin()
        raise ZeroDivisionError
    file = Path(args.output_dir) / RUN
    file.write_text(json.dumps(json.loads(file.read_text()) | {"number of processes": 2}))
    with pytest.raises(ValueError, match="number of processes was 2 and is now 1"):
        checkpoint_to_resume(args)


def test_what_a_dead_process_left_goes_and_what_a_living_one_has_stays(tmp_path):
    dead, elsewhere = tmp_path / f".saving-{HOST}-dead", tmp_path / ".saving-another_host-1"
    dead.mkdir()
    (dead / "half").write_bytes(b"half")
    elsewhere.mkdir()  # locks do not tell whether its process lives
    with folder_beside(tmp_path) as living:
        with folder_beside(tmp_path) as other:
            assert sorted(tmp_path.iterdir()) == sorted([living, other, elsewhere])
        assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere])
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_files_that_a_killed_prepare_data_was_moving_are_moved_by_the_next_one(arena):
    arena.know("prepare-data")
    seen = 0
    for back in range(10):  # the last changes: a list and three shards are moved, a folder is removed
        folder = arena.folder / f"moving{back}"
        arena.run("prepare-data", folder, ("changes", arena.changes["prepare-data"] - back))
        names = {path.name for path in (folder / "out").glob("**/*")}
        if {"report.json", ".a.finished", "a-00000-of-00003.parquet"} <= names:
            seen += 1
            assert arena.run("prepare-data", folder) == [0]
            assert contents(folder / "out") == arena.expected["prepare-data"]
    assert seen >= 4


def test_a_run_that_began_from_elsewhere_goes_on_from_its_own_checkpoint(args, tmp_path):
    args.resume_from_checkpoint = str(checkpoint(tmp_path / "elsewhere/checkpoint-5"))
    with pytest.raises(ZeroDivisionError), Run(args) as run:
        run.begin()
        assert run.checkpoint == args.resume_from_checkpoint
        own = checkpoint(Path(args.output_dir) / "checkpoint-6")
        raise ZeroDivisionError
    assert checkpoint_to_resume(args) == str(own)


def test_checkpoints_of_weights_alone_are_not_resumed_and_not_removed(args):
    args.save_only_model = True
    with pytest.raises(ZeroDivisionError), Run(args) as run:
        run.begin()
        (checkpoint(Path(args.output_dir) / "checkpoint-6") / MANIFEST).unlink()
        raise ZeroDivisionError
    with Run(args) as run:
        run.begin()
        assert run.checkpoint is None
    assert (Path(args.output_dir) / "checkpoint-6/optimizer.pt").is_file()
