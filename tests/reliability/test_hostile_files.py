"""Every hostile file of `hostile_corpus` ends in success or in a documented error, within a time and a memory.

The files come from strangers: nothing in them is run, nothing outside of them is opened, nothing is asked of the network.
"""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hostile_corpus import HARMLESS, MARKER, REFUSED, Bomb, Case, cases, png
from loopback_hub import LoopbackHub, Repository
from transformers import AutoModel, AutoProcessor, NanoChatConfig

from unitok_hf import UniTokConfig, UniTokForConditionalGeneration, UniTokProcessor, UniTokVQModel, save_remote_code
from unitok_hf.training.collators import (
    PictureCollator,
    PictureDataset,
    StreamCollator,
    StreamDataset,
    read_rows,
    require_pictures,
    require_size,
    require_text,
)
from unitok_hf.training.data import PrepareDataArguments, prepare_data
from unitok_hf.training.generate import load_model
from unitok_hf_cli import main


ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 20, 2 * 2**30  # per case; what the process has already does not count
# until the classes of models and the command line refuse in words
TINY = {"block_out_channels": (32, 32, 32), "latent_channels": 8, "num_vq_embeddings": 64}


class Late(BaseException):
    """The deadline has passed; no `except Exception` keeps it."""


def late(*_):
    raise Late(f"not done after {SECONDS} s")


@contextlib.contextmanager
def bounded():
    """A deadline, and on Linux a limit of the address space above what is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if Path("/proc/self/statm").exists():
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(function, *arguments) -> str:
    """ "harmless", or "refused" after an error of a documented kind that says something."""
    with bounded():
        try:
            function(*arguments)
        except (ValueError, OSError) as error:
            assert str(error).strip()
            return REFUSED
    return HARMLESS


@pytest.fixture(autouse=True)
def no_traces(tmp_path, monkeypatch):
    """Fails a test in which a pickle or a module of the file was run, or a connection was made to another machine."""
    marker = tmp_path / "marker"
    monkeypatch.setenv(MARKER, str(marker))
    connect = socket.socket.connect

    def here_alone(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"), f"connects to {address}"
        assert address[1] != 9, "an address in the file was asked for"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", here_alone)
    yield
    assert not marker.exists(), "code of the file was run"


@pytest.fixture(scope="module")
def good(tmp_path_factory, processor):
    """Folders of an image tokenizer and of a model, to be spoiled."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    UniTokVQModel(**TINY).save_pretrained(folder / "tokenizer")
    text_config = NanoChatConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = UniTokConfig(text_config=text_config, text_vocab_size=384, num_visual_tokens=64, vq_config=TINY)
    UniTokForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def spoiled(case: Case, good: Path, tmp_path: Path) -> Path:
    """A copy of a good folder to which this was done."""
    source = good / ("tokenizer" if case.kind == "tokenizer" else "model")
    shutil.copytree(source, tmp_path / "spoiled")
    case.make(tmp_path / "spoiled")
    return tmp_path / "spoiled"


def all_of(*kinds: str):
    return pytest.mark.parametrize("case", cases(*kinds), ids=str)


def test_there_are_at_least_two_hundred_cases_and_no_two_have_one_name():
    names = [str(case) for case in cases()]
    assert len(names) >= 200
    assert [name for name, count in Counter(names).items() if count > 1] == []


@all_of("picture", "listing")
def test_a_hostile_picture_or_listing_is_left_out_with_a_reason_or_refused(case, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out" / "a.parquet"
    folder.mkdir()
    case.make(folder)
    if case.kind == "picture":
        (folder / "good.webp").write_bytes(png(format="WEBP"))
    reports = []
    arguments = PrepareDataArguments(output_file=str(output), folder=str(folder))
    found = outcome(lambda: reports.append(prepare_data(arguments)))
    if case.outcome in (REFUSED, HARMLESS):
        assert found == case.outcome
    if case.outcome == REFUSED:
        assert not output.parent.exists() or not any(output.parent.iterdir()), "something was written"
    elif case.outcome == HARMLESS:
        assert reports[0].left_out == []
    else:
        assert [left.reason for left in reports[0].left_out] == [case.outcome]


@all_of("archive")
def test_a_hostile_archive_is_refused_and_never_unpacked(case, tmp_path):
    case.make(tmp_path / "a.tar.gz")
    before = set(tmp_path.parent.iterdir())
    arguments = PrepareDataArguments(
        output_file=str(tmp_path / "out" / "a.parquet"), cifar_archive=str(tmp_path / "a.tar.gz")
    )
    assert outcome(prepare_data, arguments) == case.outcome
    assert set(tmp_path.parent.iterdir()) == before and not Path("/tmp/evil").exists()


@all_of("table")
def test_a_hostile_table_is_refused_or_harmless_to_prepare_data_and_to_both_trainings(case, tmp_path, tokenizer, good):
    file = tmp_path / "in" / "a.parquet"
    file.parent.mkdir()
    case.make(file)

    def tokenizer_training():
        rows = read_rows(str(file))
        require_size(rows, 64)
        require_pictures(rows)
        data = PictureDataset(rows, "none", 0)
        PictureCollator()([data[index] for index in range(len(data))])

    def gpt_training():
        rows = read_rows(str(file))
        require_text(rows, "text")
        if "image_codes" not in rows.column_names:
            require_size(rows, 64)
        data = StreamDataset(rows, tokenizer, 16, "text", 0.5, 0.1, 64, "none", 0)
        data.lengths()
        batch = StreamCollator(tokenizer)(data.__getitems__(list(range(len(data)))))
        if "image_codes" in batch:
            model = UniTokForConditionalGeneration.from_pretrained(good / "model")
            model.fill_images(batch["input_ids"], image_codes=batch["image_codes"])

    arguments = PrepareDataArguments(output_file=str(tmp_path / "out" / "a.parquet"), dataset=str(file))
    found = [outcome(prepare_data, arguments), outcome(tokenizer_training), outcome(gpt_training)]
    assert ",".join(found) == case.outcome


@all_of("tokenizer")
def test_a_hostile_image_tokenizer_is_refused_or_harmless(case, good, tmp_path):
    assert outcome(UniTokVQModel.from_pretrained, spoiled(case, good, tmp_path)) == case.outcome


@all_of("config")
def test_a_hostile_configuration_is_refused_or_harmless(case, good, tmp_path):
    assert outcome(UniTokConfig.from_pretrained, spoiled(case, good, tmp_path)) == case.outcome


@all_of("model", "processor")
def test_a_hostile_model_is_refused_or_harmless(case, good, tmp_path):
    folder = spoiled(case, good, tmp_path)
    assert outcome(load_model, str(folder), torch.device("cpu")) == case.outcome


# what only the Auto classes read: a class that is named need not be found
NOT_ASKED = ("another kind of model", "kind of a number", "kind of a list", "processor of a number")


@all_of("model", "processor")
def test_a_hostile_model_is_refused_by_our_classes_too(case, good, tmp_path):
    folder = spoiled(case, good, tmp_path)
    ours = UniTokForConditionalGeneration if case.kind == "model" else UniTokProcessor
    found = outcome(ours.from_pretrained, folder)
    assert found == case.outcome or case.name in NOT_ASKED


@all_of("arguments")
def test_a_hostile_file_of_arguments_is_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = case.make(tmp_path)
    with bounded(), pytest.raises(SystemExit) as stopped:
        main(["train-tokenizer", str(file)])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and len(lines[0]) < 2_000, lines
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("weights cut in half", ["generate", "--prompt", "a", "--checkpoint"]),
        ("config.json is nested deeply", ["generate", "--prompt", "a", "--checkpoint"]),
        ("index of a pickle", ["generate", "--prompt", "a", "--checkpoint"]),
    ],
)
def test_the_command_line_says_in_one_line_what_is_wrong_with_a_model(name, command, good, tmp_path, capsys):
    [case] = [case for case in cases("model") if case.name == name]
    folder = spoiled(case, good, tmp_path)
    with bounded(), pytest.raises(SystemExit) as stopped:
        main([*command, str(folder)])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and str(folder) in lines[0], lines


CODE = f"import os; open(os.environ['{MARKER}'], 'w').close()\n"
# loads what is asked for, one after the other, and prints for each whether it could
LOAD = r"""
import sys
import unitok_hf
from transformers import AutoModel, AutoProcessor, AutoTokenizer
autos = {"model": AutoModel, "processor": AutoProcessor, "tokenizer": AutoTokenizer}
for asked in sys.argv[1:]:
    kind, name, flag = asked.split(",")
    try:
        loaded = autos[kind].from_pretrained(name, **({"trust_remote_code": True} if flag == "flag" else {}))
        print("\nloaded", type(loaded).__module__.split(".")[0])
    except (ValueError, OSError) as error:
        print("\nrefused", str(error).splitlines()[0])
"""


def load(hub: LoopbackHub, folder: Path, marker: Path, *asked: str) -> list[str]:
    """What became of it in a process of its own, which has nobody to ask for permission."""
    environment = hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT), MARKER: str(marker)}
    command = [sys.executable, "-c", LOAD, *asked]
    result = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL
    )
    words = [line.partition(" ")[0] for line in result.stdout.splitlines()]
    return [word for word in words if word in ("loaded", "refused")]  # between them are questions, to nobody


@pytest.fixture(scope="module")
def hub(good):
    """A Hub with a model of ours to which its owner has added code, and one that is nothing but code."""
    folder = good / "remote"
    shutil.copytree(good / "model", folder)
    save_remote_code(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    evil = {name: CODE.encode() + content if name.endswith(".py") else content for name, content in files.items()}
    other = json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
    with LoopbackHub() as hub:
        for name, content in (
            ("me/ours", evil),
            ("me/evil", {"config.json": other.encode(), "evil.py": CODE.encode()}),
        ):
            hub.repositories["model", name] = Repository("model", name, private=False)
            hub.repositories["model", name].commit("main", content)
        yield hub


def test_code_of_a_repository_is_not_run_without_the_flag(hub, tmp_path):
    """Ours load with the installed package, though their files hold other code; what is nothing but code is refused."""
    ours = [f"{kind},me/ours,no" for kind in ("model", "processor", "tokenizer")]
    evil = [f"{kind},me/evil,no" for kind in ("model", "processor", "tokenizer")]
    assert load(hub, tmp_path, tmp_path / "code", *ours, *evil) == ["loaded"] * 3 + ["refused"] * 3
    assert not (tmp_path / "code").exists()


@pytest.mark.slow
def test_code_of_a_repository_would_be_run_with_the_flag(hub, tmp_path):
    """The other half of the proof: the code that the test above looks for is there and would leave its mark."""
    load(hub, tmp_path, tmp_path / "code", "model,me/evil,flag")
    assert (tmp_path / "code").exists()


def test_the_pickle_of_these_tests_would_leave_its_mark(tmp_path, monkeypatch):
    monkeypatch.setenv(MARKER, str(tmp_path / "pickle"))
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "pickle").exists()


def test_a_picture_of_the_machine_does_not_get_into_the_data(tmp_path):
    """A table that names a local picture: neither is it in what prepare-data writes, nor is it trained on."""
    [case] = [case for case in cases("table") if case.name == "picture in a local file that is one"]
    file = tmp_path / "in.parquet"
    case.make(file)
    assert (tmp_path / "secret.png").exists()
    with pytest.raises(ValueError, match="4 link"):
        prepare_data(PrepareDataArguments(output_file=str(tmp_path / "out" / "a.parquet"), dataset=str(file)))
    with pytest.raises(ValueError, match="row 0 names a file instead of holding its bytes"):
        read_rows(str(file))


def test_a_model_does_not_take_the_memory_that_its_configuration_claims(good, tmp_path):
    """The file has 64 codes, the configuration 16 million: half a gigabyte is not allocated to find that out."""
    [case] = [case for case in cases("tokenizer") if case.name.startswith("16 million")]
    folder = spoiled(case, good, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome(UniTokVQModel.from_pretrained, folder) == REFUSED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_auto_classes_find_the_classes_that_these_tests_are_about(good):
    assert type(AutoModel.from_pretrained(good / "model")) is UniTokForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(good / "model")) is UniTokProcessor
    assert os.environ["HF_HUB_OFFLINE"] == "1"
