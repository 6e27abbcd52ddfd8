"""One process, two, four: the same training; and when one of them dies, all end at once with the reason."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import psutil
import pytest
from conftest import CAPTIONS, CLI, ROOT, draw, flags, run_program
from PIL import ImageOps


STEPS = 50
COMMON = {"max_steps": STEPS, "logging_steps": 1, "eval_strategy": "no", "use_cpu": True, "disable_tqdm": True}
VQ = {"block_out_channels": [32, 32, 32], "latent_channels": 8, "num_vq_embeddings": 16, "continuous_fraction": 0.3}
# rounding grows from step to step, and where a latent lies between two codes it decides; small steps leave it small
VQ |= {"adam_epsilon": 1e-3, "learning_rate": 1e-4}
GPT = {"depth": 1, "hidden_size": 64, "text_vocab_size": 300, "max_length": 48, "train_sampling_strategy": "random"}
GPT |= {"adam_epsilon": 1e-3}


def command(processes: int, *words: object) -> list[str]:
    """A command line of unitok-hf on so many processes."""
    start = [sys.executable, "-c", CLI]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        start += ["-m", "unitok_hf.training.cli"]
    return [*start, *map(str, words)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen different pictures and captions: eight, and the same upside down."""
    pictures = [draw(caption) for caption in CAPTIONS]
    pictures += [ImageOps.flip(ImageOps.invert(picture)) for picture in pictures]
    texts = CAPTIONS + [f"{caption} upside down" for caption in CAPTIONS]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    path = tmp_path_factory.mktemp("data") / "pictures.parquet"
    datasets.Dataset.from_dict({"image": pictures, "text": texts}, features=features).to_parquet(str(path))
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trains a tokenizer and a model on it with so many processes, batches of eight in all; gives their folder."""
    done: dict[int, Path] = {}

    def train(processes: int) -> Path:
        if processes not in done:
            out = tmp_path_factory.mktemp(f"of{processes}")
            tokenizer = done[1] / "tokenizer" if processes > 1 else out / "tokenizer"
            common = COMMON | {"data_path": data, "eval_data_path": data, "batch_size": 8 // processes}
            common |= {"save_steps": 25, "save_total_limit": 3}
            run_program(command(processes, "train-tokenizer", *flags(common | VQ | {"output_dir": out / "tokenizer"})))
            own = GPT | {"output_dir": out / "model", "visual_tokenizer_path": tokenizer}
            run_program(command(processes, "train", *flags(common | own)))
            done[processes] = out
        return done[processes]

    return train


def losses(run: Path, step: int = STEPS) -> list[float]:
    """The loss of every step."""
    history = json.loads((run / f"checkpoint-{step}/trainer_state.json").read_text())["log_history"]
    return [log["loss"] for log in history if "loss" in log]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["tokenizer", "model"])
def test_several_processes_have_the_losses_of_one(trained, kind, processes):
    alone, together = losses(trained(1) / kind), losses(trained(processes) / kind)
    assert len(alone) == len(together) == STEPS
    assert max(abs(a - b) / a for a, b in zip(alone, together, strict=True)) < 1e-6
    assert alone[-1] < 0.8 * alone[0]


@pytest.mark.parametrize("kind", ["tokenizer", "model"])
@pytest.mark.parametrize("before", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(trained, data, tmp_path, kind, before):
    after = 3 - before
    words = {"tokenizer": "train-tokenizer", "model": "train"}[kind]
    own = VQ if kind == "tokenizer" else GPT | {"visual_tokenizer_path": trained(1) / "tokenizer"}
    common = COMMON | {"data_path": data, "eval_data_path": data, "batch_size": 8 // after, "save_steps": 25}
    common |= {"resume_from_checkpoint": trained(before) / kind / "checkpoint-25", "output_dir": tmp_path / "run"}
    run_program(command(after, words, *flags(common | own)))
    expected, found = losses(trained(1) / kind), losses(tmp_path / "run")
    assert max(abs(a - b) / a for a, b in zip(expected, found, strict=True)) < 1e-6


@pytest.mark.slow
def test_rows_that_do_not_divide_are_trained_on_to_the_end(trained, data, tmp_path):
    """Sixteen rows in batches of three on two processes: the last step of an epoch is a short one."""
    common = COMMON | {"data_path": data, "eval_data_path": data, "batch_size": 3, "max_steps": 7}
    common |= {"output_dir": tmp_path / "run", "visual_tokenizer_path": trained(1) / "tokenizer", "save_steps": 7}
    run_program(command(2, "train", *flags(common | GPT)))
    assert len(losses(tmp_path / "run", 7)) == 7


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """37 numbers in row groups of five."""
    path = tmp_path_factory.mktemp("numbers") / "numbers.parquet"
    datasets.Dataset.from_dict({"text": [str(row) for row in range(37)]}).to_parquet(str(path), batch_size=5)
    return path


def ids(numbered: Path, out: Path, processes: int, steps: int, checkpoint: Path | None = None) -> list[list[int]]:
    """Which rows came in every step, batches of eight in all."""
    start = command(processes)[:-2] if processes > 1 else [sys.executable]
    words = [numbered, out, steps, 8 // processes, *([checkpoint] if checkpoint else [])]
    run_program([*start, str(Path(__file__).parent / "stream_of_ids.py"), *map(str, words)])
    of_rank = [json.loads((out / f"ids-{rank}.json").read_text()) for rank in range(processes)]
    return [sum(batches, []) for batches in zip(*of_rank, strict=True)]


def test_no_streamed_row_is_lost_or_doubled(numbered, tmp_path):
    """For 14 steps of eight rows, three times 37 and one: by one process and two, in one go and resumed by others."""
    alone = ids(numbered, tmp_path / "one", 1, 14)
    together = ids(numbered, tmp_path / "two", 2, 14)
    assert alone == together
    stream = sum(alone, [])
    assert len(stream) == 14 * 8
    for begin in (0, 37, 74):
        assert sorted(stream[begin : begin + 37]) == list(range(37))
    assert stream[:37] != stream[37:74]
    assert ids(numbered, tmp_path / "two again", 2, 14, tmp_path / "one/checkpoint-6") == alone[6:]
    assert ids(numbered, tmp_path / "one again", 1, 14, tmp_path / "two/checkpoint-9") == alone[9:]


def test_a_process_that_dies_takes_all_down_and_is_named(trained, data, tmp_path):
    common = COMMON | {"data_path": data, "eval_data_path": data, "batch_size": 4, "max_steps": 100_000}
    common |= {"output_dir": tmp_path / "run", "visual_tokenizer_path": trained(1) / "tokenizer", "save_steps": 5}
    launcher = subprocess.Popen(
        command(2, "train", *flags(common | GPT)),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    try:
        for _ in range(1200):
            assert launcher.poll() is None, launcher.stderr.read()
            if list((tmp_path / "run").glob("checkpoint-*/trainer_state.json")):
                break
            time.sleep(0.1)
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        workers[1].kill()
        begin = time.monotonic()
        _, errors = launcher.communicate(timeout=60)
        assert time.monotonic() - begin < 30
        assert launcher.returncode != 0 and "SIGKILL" in errors
        assert not any(worker.is_running() for worker in workers)
    finally:
        launcher.kill()
