"""What every test may rely on: no network, no cache of the developer's, few threads, the same in subprocesses.

The libraries read these switches when they are imported, so they are set before anything else.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


hub_cache = tempfile.TemporaryDirectory(prefix="unitok-hf-tests-")
os.environ |= {
    "HF_HOME": hub_cache.name,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",  # more threads only wait for each other on models this small
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402
from transformers import NanoChatConfig  # noqa: E402

from unitok_hf import (  # noqa: E402
    UniTokConfig,
    UniTokForConditionalGeneration,
    UniTokImageProcessor,
    UniTokProcessor,
    UniTokVQModel,
    add_special_tokens,
)
from unitok_hf.training.gpt_trainer import train_text_tokenizer  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
CLI = "import sys; from unitok_hf_cli import main; main(sys.argv[1:])"
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# Runs command lines that come as JSON; when a tokenizer has been trained, each process keeps all that it remembers.
PER_RANK = """
import json, sys
from safetensors.torch import save_file
from unitok_hf.training import vq_trainer
from unitok_hf_cli import main


def keep(self, args, state, control, model, **_):
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, f"{args.output_dir}/rank{args.process_index}.safetensors")


vq_trainer.CodebookCallback.on_train_end = keep
for argv in json.loads(sys.argv[1]):
    main(argv)
"""


CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "black") for shape in ("circle", "square")]
TINY_VQ = {"block_out_channels": (32, 32, 32), "latent_channels": 8, "num_vq_embeddings": 64}


def draw(caption: str, size: int = 64) -> Image.Image:
    """The picture of a caption such as "a red circle"."""
    _, colour, shape = caption.split()
    picture = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(picture)
    box = (size // 8, size // 8, size - size // 8, size - size // 8)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
    return picture


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """Eight captions."""
    return CAPTIONS


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """The eight 64x64 pictures of the captions."""
    return [draw(caption) for caption in CAPTIONS]


@pytest.fixture(scope="session")
def noise() -> torch.Tensor:
    """Four pictures (4, 3, 64, 64) of noise in [-1, 1]."""
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE trained on the captions, with all special tokens."""
    return add_special_tokens(train_text_tokenizer(CAPTIONS, 300))


@pytest.fixture
def vq_model() -> UniTokVQModel:
    """An untrained tokenizer of the default geometry at a tiny width: 64x64 pixels, 4x4 of 64 codes."""
    torch.manual_seed(0)
    model = UniTokVQModel(**TINY_VQ).eval()
    torch.nn.init.normal_(model.codebook, std=0.3)
    return model


@pytest.fixture
def model() -> UniTokForConditionalGeneration:
    """An untrained model of two layers of width 64 around a tiny tokenizer."""
    torch.manual_seed(0)
    text_config = NanoChatConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.2
    )
    config = UniTokConfig(text_config=text_config, text_vocab_size=384, num_visual_tokens=64, vq_config=TINY_VQ)
    return UniTokForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def processor(tokenizer) -> UniTokProcessor:
    """The processor of `model`."""
    return UniTokProcessor(UniTokImageProcessor(), tokenizer, num_image_tokens=16)


@pytest.fixture
def parquet(tmp_path, pictures, captions) -> str:
    """A Parquet file of the eight pictures and captions."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": pictures, "text": captions}, features=features)
    rows.to_parquet(str(tmp_path / "pictures.parquet"))
    return str(tmp_path / "pictures.parquet")


def run_program(command: list[str]) -> None:
    """Runs a program on this checkout, with as many threads as here: sums of floats depend on them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def flags(arguments: dict) -> list[str]:
    """Arguments as a command line has them."""
    words = []
    for name, value in arguments.items():
        if value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
