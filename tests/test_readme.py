"""The README's commands and snippets work as written."""

import re
import shlex
from argparse import SUPPRESS
from pathlib import Path

import pytest
import torch

from unitok_hf.training.export import ExportArguments, export
from unitok_hf_cli import COMMANDS, Parser, add_arguments, read_arguments


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("unitok-hf ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = Parser(argument_default=SUPPRESS, allow_abbrev=False)
    values = read_arguments(parser, add_arguments(parser, COMMANDS[words[0]]), words[1:])
    assert values


def test_every_step_is_shown():
    shown = {words[0] for words in commands()}
    assert shown == set(COMMANDS) - {"demo"}  # that one is behind `make demo`


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    asked = re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)
    assert asked and set(asked) <= set(targets)


def test_every_folder_of_the_tree_exists():
    [tree] = [block for block in blocks("") if "modeling_unitok/" in block]
    names = [line.split()[0] for line in tree.splitlines()]
    assert len(names) > 8
    assert all((ROOT / name).exists() for name in names)


def test_the_snippets_run(model, processor, vq_model, tmp_path, monkeypatch):
    """On an untrained model of the demo's layout: 32x32 pictures, patches of 4."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("out/demo/model")
    processor.save_pretrained("out/demo/model")
    vq_model.save_pretrained("out/demo/tokenizer")
    export(ExportArguments("out/demo/model", "out/plain_model"))
    names = {}
    for snippet in blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["pictures"]) == 4
    assert names["codes"].dtype == torch.int64
    assert any(not isinstance(part, str) for part in names["processor"].decode_mixed(names["ids"], names["model"])[0])
