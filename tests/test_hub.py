"""Push and pull through unmodified clients, over HTTP, to the Hub of `loopback_hub`; each client in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLI
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from safetensors.torch import save_file

from unitok_hf import save_remote_code
from unitok_hf.training.cards import write_card
from unitok_hf.training.push import files_to_share
from unitok_hf.training.runs import save_beside


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", params=[False, True], ids=["direct", "redirected"])
def hubs(request):
    """A Hub that sends large files itself, and one that redirects to them."""
    with LoopbackHub(redirect=request.param) as hub:
        yield hub


@pytest.fixture
def hub():
    """An empty Hub."""
    with LoopbackHub() as hub:
        yield hub


def run(hub: LoopbackHub, home: Path, program: str, *words: object, fails: bool = False, **environment: str) -> str:
    """What a program prints that has this Hub, and a cache in `home`."""
    (home / "cwd").mkdir(parents=True, exist_ok=True)  # nothing of ours is importable from here
    environment = hub.environment(home) | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=home / "cwd", env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else result.stdout


@pytest.fixture
def released(model, processor, tmp_path, noise):
    """A saved model, and what it computes."""
    folder = tmp_path / "released"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "eval_results.json").write_text(json.dumps({"eval_image_bits": 5.5, "epoch": 2.0}))
    (folder / "training_state.safetensors").write_bytes(b"not for others")
    expected(model, processor, noise, tmp_path / "expected.safetensors")
    return folder


@torch.no_grad()
def expected(model, processor, noise, path: Path) -> None:
    """Logits, codes and greedy streams, to be found again elsewhere."""
    inputs = processor(text=["a red circle", "a"], generation_mode="image", return_tensors="pt")
    tensors = {
        "logits": model(**inputs).logits,
        "codes": model.get_image_tokens(noise),
        "drawn": model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2.0),
        "noise": noise,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


REQUIRE_EQUAL = """
import sys, json, torch, transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

wanted = load_file(sys.argv[2])

@torch.no_grad()
def require_equal(model, processor):
    inputs = processor(text=["a red circle", "a"], generation_mode="image", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, wanted["logits"])
    assert torch.equal(model.get_image_tokens(wanted["noise"]), wanted["codes"])
    drawn = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=2.0)
    assert torch.equal(drawn, wanted["drawn"])

def load_all(repo, **options):
    processor = AutoProcessor.from_pretrained(repo, **options)
    assert type(processor).__name__ == "UniTokProcessor"
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model = getattr(transformers, name).from_pretrained(repo, **options)
        assert type(model).__name__ == "UniTokForConditionalGeneration", name
        require_equal(model, processor)
    assert AutoConfig.from_pretrained(repo, **options).model_type == "unitok_hf"
    assert AutoTokenizer.from_pretrained(repo, **options).image_token == "<|image|>"
    assert type(AutoImageProcessor.from_pretrained(repo, **options)).__name__ == "UniTokImageProcessor"
    return model, processor
"""

INSTALLED = (
    "import unitok_hf\n"
    + REQUIRE_EQUAL
    + """
repo, _, revision = sys.argv[1:]
model, _ = load_all(repo)
assert type(model).__module__ == "unitok_hf.modeling_unitok.modeling_unitok"  # though the repository has code, too
load_all(repo, revision=revision)
pipe = unitok_hf.UniTokPipeline.from_pretrained(repo, revision=revision)
require_equal(pipe.model, pipe.processor)
images = pipe("a red circle", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0)).images
assert [image.size for image in images] == [(64, 64)] * 2
draw = transformers.pipeline("text-to-image", model=repo)
assert draw(text="a red circle")[0]["generated_image"].size == (64, 64)
"""
)

NOT_INSTALLED = (
    """
import sys
sys.modules["unitok_hf"] = None  # as if it were not there
"""
    + REQUIRE_EQUAL
    + """
repo, _, again = sys.argv[1:]
model, processor = load_all(repo, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
model.save_pretrained(again)
processor.save_pretrained(again)
load_all(again, trust_remote_code=True)
"""
)


def test_a_model_is_pushed_in_one_commit_and_pulled_with_and_without_the_package(hubs, released, tmp_path):
    name = f"me/{tmp_path.name}"
    print(run(hubs, tmp_path / "pusher", CLI, "push", released, name, "--license", "apache-2.0"))
    repository = hubs.repositories["model", name]
    first, last = list(repository.commits)
    files = repository.files()
    assert repository.branches == {"main": last}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert {"modeling_unitok.py", "modeling_vq.py", "vocabulary_unitok.py", "pixels.py"} <= set(files)
    assert not {"training_state.safetensors", "eval_results.json", "training_args.json"} & set(files)
    about = ModelCard(files["README.md"].decode()).data
    assert (about.pipeline_tag, about.library_name, about.license) == ("any-to-any", "transformers", "apache-2.0")
    assert about.eval_results[0].metric_type == "image_bits" and about.eval_results[0].metric_value == 5.5

    wanted = tmp_path / "expected.safetensors"
    home = tmp_path / "with"
    run(hubs, home, INSTALLED, name, wanted, last)
    run(hubs, home, INSTALLED, name, wanted, last, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    run(hubs, tmp_path / "without", NOT_INSTALLED, name, wanted, tmp_path / "again", PYTHONPATH="")
    error = run(
        hubs, tmp_path / "wary", NOT_INSTALLED.replace("trust_remote_code=True", ""), name, wanted, "x", fails=True
    )
    assert "trust_remote_code" in error


PYTHON_PUSH = """
import sys
import unitok_hf
from transformers import AutoModel, AutoProcessor
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
HfApi().create_repo(repo, private=True)
HfApi().create_branch(repo, branch="sharded")
AutoModel.from_pretrained(folder).push_to_hub(repo, max_shard_size="200KB", revision="sharded")
AutoProcessor.from_pretrained(folder).push_to_hub(repo, revision="sharded")
AutoModel.from_pretrained(folder).model.vqmodel.push_to_hub(repo + "-vq")
unitok_hf.UniTokPipeline.from_pretrained(folder).push_to_hub(repo + "-pipe")
"""

PYTHON_PULL = (
    "import unitok_hf\n"
    + REQUIRE_EQUAL
    + """
import diffusers
from unitok_hf import UniTokPipeline, UniTokVQModel
repo, _ = sys.argv[1:]
model, _ = load_all(repo, revision="sharded")
vq_model = UniTokVQModel.from_pretrained(repo + "-vq")
codes = vq_model.encode_to_indices(wanted["noise"]).flatten(1) + model.vocabulary.offset
assert torch.equal(codes, wanted["codes"])
assert type(diffusers.AutoModel.from_pretrained(repo + "-vq")) is diffusers.VQModel
load_all(repo + "-pipe")
pipe = UniTokPipeline.from_pretrained(repo + "-pipe", torch_dtype=torch.float32)
pipe.save_pretrained("again")
UniTokPipeline.from_pretrained("again", dtype=torch.bfloat16).save_pretrained("once more")
require_equal(pipe.model, pipe.processor)
"""
)


def test_parts_are_pushed_from_python_sharded_private_and_to_a_branch(hub, released, tmp_path):
    run(hub, tmp_path / "pusher", PYTHON_PUSH, released, "me/parts")
    repository = hub.repositories["model", "me/parts"]
    shards = [name for name in repository.files("sharded") if name.endswith(".safetensors")]
    assert repository.private and len(shards) > 2 and list(repository.files("main")) == [".gitattributes"]
    wanted = tmp_path / "expected.safetensors"
    run(hub, tmp_path / "puller", PYTHON_PULL, "me/parts", wanted)
    error = run(hub, tmp_path / "stranger", PYTHON_PULL, "me/parts", wanted, fails=True, HF_TOKEN="")
    assert "me/parts" in error


def test_an_upload_cut_off_in_the_middle_leaves_the_repository_as_it_was(hub, released, tmp_path):
    run(hub, tmp_path / "pusher", CLI, "push", released, "me/cut")
    repository = hub.repositories["model", "me/cut"]
    before = dict(repository.branches), dict(repository.commits)
    weights = released / "model.safetensors"
    from safetensors.torch import load_file

    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    hub.cut_after = 50_000
    error = run(hub, tmp_path / "pusher", CLI, "push", released, "me/cut", fails=True)
    assert error.strip()
    assert (repository.branches, repository.commits) == before
    hub.cut_after = None
    run(hub, tmp_path / "pusher", CLI, "push", released, "me/cut")
    assert len(repository.commits) == len(before[1]) + 1
    assert repository.files()["model.safetensors"] == weights.read_bytes()


def test_what_the_hub_refuses_is_one_line(hub, released, tmp_path):
    error = run(hub, tmp_path / "stranger", CLI, "push", released, "me/x", fails=True, HF_TOKEN="hf_wrong")
    assert error.count("\n") == 1 and "the Hub refused me/x" in error and "Invalid credentials" in error
    assert not hub.repositories
    for words, message in (
        (("push", tmp_path / "none", "me/x"), "no model, image tokenizer or Parquet data at"),
        (("push", released, "x"), "the repository must be OWNER/NAME, got 'x'"),
    ):
        assert message in run(hub, tmp_path / "stranger", CLI, *words, fails=True)


DATA = """
import sys, datasets, unitok_hf
from unitok_hf.training.collators import read_rows
repo, local = sys.argv[1:]
ours, theirs = read_rows(local), datasets.load_dataset(repo, split="train")
assert ours.features.to_dict() == theirs.features.to_dict() and len(ours) == len(theirs) == 8
assert [row["text"] for row in ours] == [row["text"] for row in theirs]
streamed = list(datasets.load_dataset(repo, split="train", streaming=True))
for first, second, third in zip(ours, theirs, streamed):
    assert first["image"].tobytes() == second["image"].tobytes() == third["image"].tobytes()
"""


def test_prepared_data_is_pushed_and_loads_whole_and_streamed(hubs, parquet, tmp_path):
    name = f"me/{tmp_path.name}"
    run(hubs, tmp_path / "pusher", CLI, "push", parquet, name, "--private", "true")
    assert hubs.repositories["dataset", name].private
    run(hubs, tmp_path / "puller", DATA, name, parquet)


def test_a_tokenizer_is_pushed_with_its_card(hub, vq_model, tmp_path):
    vq_model.save_pretrained(tmp_path / "tokenizer")
    run(hub, tmp_path / "pusher", CLI, "push", tmp_path / "tokenizer", "me/tokenizer", "--revision", "v1")
    repository = hub.repositories["model", "me/tokenizer"]
    files = repository.files("v1")
    assert set(files) - {".gitattributes"} == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    assert list(repository.files("main")) == [".gitattributes"]
    about = ModelCard(files["README.md"].decode())
    assert about.data.library_name == "diffusers" and 'from_pretrained("me/tokenizer")' in about.text


def test_a_card_is_made_again_for_its_repository_unless_somebody_wrote_it(vq_model, tmp_path):
    vq_model.save_pretrained(tmp_path)
    write_card(tmp_path, {"psnr": 20.5})
    assert f'from_pretrained("{tmp_path}")' in (tmp_path / "README.md").read_text()
    shared = files_to_share(tmp_path, "me/tokenizer", None)["README.md"].decode()
    assert 'from_pretrained("me/tokenizer")' in shared and "| psnr | 20.5 |" in shared and str(tmp_path) not in shared
    (tmp_path / "README.md").write_text(f'mine: from_pretrained("{tmp_path}")')
    write_card(tmp_path)
    assert str(tmp_path) in (tmp_path / "README.md").read_text()
    shared = files_to_share(tmp_path, "me/tokenizer", None)["README.md"].decode()
    assert shared == 'mine: from_pretrained("me/tokenizer")'


def test_code_is_added_to_a_saved_model_only(tmp_path, released):
    with pytest.raises(FileNotFoundError, match="no saved model at"):
        save_remote_code(tmp_path)
    save_remote_code(released)
    code = {path.name for path in released.glob("*.py")}
    save_beside(str(tmp_path / "other"), lambda folder: None)
    assert {"modeling_unitok.py", "processing_unitok.py", "configuration_unitok.py"} <= code
    for path in released.glob("*.py"):
        assert "from .." not in path.read_text() and "unitok_hf." not in "".join(
            line for line in path.read_text().splitlines() if line.lstrip().startswith(("from ", "import "))
        )
    assert not [name for name in os.listdir(released) if name.startswith(".")]


def test_a_training_run_pushes_what_it_has_made(hub, parquet, tmp_path):
    """Both trainers, by the Trainer's own flags."""
    common = [
        "--data_path",
        parquet,
        "--eval_data_path",
        parquet,
        "--max_steps",
        "4",
        "--batch_size",
        "4",
        "--use_cpu",
        "true",
    ]
    common += ["--push_to_hub", "true", "--hub_strategy", "end", "--save_strategy", "no", "--eval_strategy", "no"]
    vq = ["--block_out_channels", "32", "32", "32", "--latent_channels", "8", "--num_vq_embeddings", "32"]
    vq += ["--continuous_fraction", "0.3", "--output_dir", tmp_path / "vq", "--hub_model_id", "me/vq"]
    gpt = [
        "--depth",
        "1",
        "--hidden_size",
        "64",
        "--visual_tokenizer_path",
        tmp_path / "vq",
        "--text_vocab_size",
        "300",
    ]
    gpt += ["--output_dir", tmp_path / "gpt", "--hub_model_id", "me/gpt", "--hub_private_repo", "true"]
    run(hub, tmp_path / "vq-home", CLI, "train-tokenizer", *common, *vq)
    run(hub, tmp_path / "gpt-home", CLI, "train", *common, *gpt)
    files = hub.repositories["model", "me/vq"].files()
    assert set(files) - {".gitattributes"} == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}
    gpt = hub.repositories["model", "me/gpt"]
    files = gpt.files()
    assert gpt.private and {
        "model.safetensors",
        "processor_config.json",
        "modeling_unitok.py",
        "samples/7.png",
    } <= set(files)
    assert not [name for name in files if "optimizer" in name or name.startswith(("checkpoint", "training_"))]
    about = ModelCard(files["README.md"].decode())
    assert {result.metric_type for result in about.data.eval_results} >= {"image_bits", "text_bits"}
    assert about.data.widget[0]["output"]["url"] == "samples/0.png" and "<Gallery />" in about.text
    assert str(tmp_path) not in about.text and 'from_pretrained("me/gpt")' in about.text
