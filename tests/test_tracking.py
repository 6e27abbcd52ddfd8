"""What a run sends to TensorBoard and trackio, read back as a person who opens them would see it."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import CLI, ROOT, flags
from PIL import Image


VQ = {"block_out_channels": [32, 32, 32], "latent_channels": 8, "num_vq_embeddings": 32, "continuous_fraction": 0.3}
GPT = {"depth": 1, "hidden_size": 64, "text_vocab_size": 300}


@pytest.fixture
def train(parquet, tmp_path):
    """Runs both trainings for four steps with these flags, evaluated after two; their folders are vq and gpt."""

    def run(**arguments) -> None:
        common = {"data_path": parquet, "eval_data_path": parquet, "max_steps": 4, "batch_size": 4, "use_cpu": "true"}
        common |= {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "save_strategy": "no"} | arguments
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")}
        for command, own in (
            ("train-tokenizer", VQ | {"output_dir": tmp_path / "vq"}),
            ("train", GPT | {"output_dir": tmp_path / "gpt", "visual_tokenizer_path": tmp_path / "vq"}),
        ):
            words = [sys.executable, "-c", CLI, command, *flags(common | own | {"run_name": command})]
            result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, result.stderr

    return run


def test_tensorboard_has_scalars_and_picture_grids(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(report_to="tensorboard")
    for run, measure in (("vq", "eval/psnr"), ("gpt", "eval/image_bits")):
        [folder] = (tmp_path / run / "runs").iterdir()
        events = EventAccumulator(str(folder)).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
        assert [event.step for event in events.Scalars(measure)] == [2, 4]
        grids = events.Images("eval/samples")
        assert [event.step for event in grids] == [2, 4]
        for event in grids:
            with Image.open(tmp_path / run / f"samples/step_{event.step:06d}.png") as file:
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), np.asarray(file))


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage

print(json.dumps({run: SQLiteStorage.get_logs("tests", run) for run in SQLiteStorage.get_runs("tests")}))
"""


def test_trackio_has_scalars_and_picture_grids_in_one_run_each(train, tmp_path):
    train(report_to="trackio", project="tests")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    read = [sys.executable, "-c", READ_TRACKIO]
    runs = json.loads(subprocess.run(read, env=environment, capture_output=True, text=True, check=True).stdout)
    assert runs.keys() == {"train-tokenizer", "train"}
    for run, folder, measure in (("train-tokenizer", "vq", "eval/psnr"), ("train", "gpt", "eval/image_bits")):
        steps = {
            name: [log["train/global_step"] for log in runs[run] if name in log]
            for name in ("train/loss", measure, "eval/samples")
        }
        assert steps == {"train/loss": [1, 2, 3, 4], measure: [2, 4], "eval/samples": [2, 4]}
        for log in runs[run]:
            if "eval/samples" in log:
                sent = tmp_path / "trackio/media" / log["eval/samples"]["file_path"]
                ours = tmp_path / folder / f"samples/step_{log['train/global_step']:06d}.png"
                assert np.array_equal(np.asarray(Image.open(sent).convert("RGB")), np.asarray(Image.open(ours)))
