"""What `unitok-hf` understands before it starts to work, and how it ends when something is wrong."""

import argparse
import ast
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import unitok_hf_cli as cli


ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "diffusers", "datasets", "unitok_hf"}


def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def parse(*argv: str) -> dict:
    """The values that a command line such as `train-tokenizer --image_size 32` stands for."""
    parser = cli.Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    return cli.read_arguments(parser, cli.add_arguments(parser, cli.COMMANDS[argv[0]]), argv[1:])


def refusal(capsys, *argv: str) -> str:
    """The one line with which a wrong command line ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("unitok-hf")
    return err


@pytest.fixture
def write(tmp_path):
    """Writes a config file and returns its path."""

    def write_file(content, name="config.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write_file


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["--version"], ["no-such-command"]]
    + [[name, flag] for name in cli.COMMANDS for flag in ("--help", "--no_such_flag")],
    ids=" ".join,
)
def test_help_and_usage_errors_come_without_heavy_imports(argv):
    probe = (
        "import sys, unitok_hf_cli\n"
        "try: unitok_hf_cli.main(sys.argv[1:])\n"
        f"finally: print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", probe, *argv], cwd=ROOT, capture_output=True, text=True)
    wrong = any(word.startswith(("no-", "--no_")) for word in argv)
    assert result.returncode == (2 if wrong else 0)
    assert result.stderr.splitlines()[-1] == "[]"
    assert len(result.stderr.splitlines()) == (2 if wrong else 1)
    assert bool(result.stdout) != wrong


def test_help_names_every_command():
    out = run("unitok_hf_cli", "--help").stdout
    assert all(name in out and command.summary in out for name, command in cli.COMMANDS.items())


def test_version_is_that_of_the_package():
    import unitok_hf

    assert run("unitok_hf_cli", "--version").stdout == f"unitok-hf {unitok_hf.__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_flags_are_the_fields_of_the_dataclass(name):
    command = cli.COMMANDS[name]
    module = importlib.import_module(f"unitok_hf.{command.module}")
    assert callable(getattr(module, command.function))
    actual = {field.name: field for field in dataclasses.fields(getattr(module, command.arguments))}
    parser = cli.Parser(argument_default=argparse.SUPPRESS)
    flags = cli.add_arguments(parser, command)
    # only Python can make a ParallelismConfig
    assert flags.keys() - (cli.ALIASES.keys() - actual.keys()) == actual.keys() - {"parallelism_config"}

    source = Path(module.__file__)
    for field in cli.read_fields(cli.read_class(source, command.arguments)).values():
        default, factory = actual[field.name].default, actual[field.name].default_factory
        if factory is not dataclasses.MISSING:
            default = factory()
        assert (field.default == "") == (default is dataclasses.MISSING)
        if field.default:
            assert ast.literal_eval(field.default) == default, "a default that --help can show is written out"
        assert field.help == actual[field.name].metadata["help"]
        assert field.from_text, f"{field.name}: no flag can say what {field.kinds} wants"
        assert field.description in " ".join(parser.format_help().split())


def make_field(annotation: str) -> cli.Field:
    definition = ast.parse(f"class Arguments:\n    field: {annotation} = None").body[0]
    return cli.read_fields(definition)["field"]


def parse_flag(annotation: str, words: list[str]):
    parser = cli.Parser(exit_on_error=False)
    cli.add_flag(parser, make_field(annotation), "")
    return parser.parse_args(["--field", *words]).field


@pytest.mark.parametrize(
    "annotation, words, value",
    [
        ("int", ["-1"], -1),
        ("int | None", ["3"], 3),
        ("float", [".5"], 0.5),
        ("float", ["1e-3"], 1e-3),
        ("str", ["12"], "12"),
        ("str | None", ["none"], "none"),
        ("bool", [], True),
        ("bool", ["False"], False),
        ("bool | None", ["true"], True),
        ("list[str]", ["a", "b"], ["a", "b"]),
        ("list[int] | None", ["64", "128"], [64, 128]),
        ("Literal['a', 'b']", ["b"], "b"),
        ("dict | str | None", ['{"rate": 0.1}'], {"rate": 0.1}),
        ("dict | str | None", ["settings.json"], "settings.json"),
        ("dict[str, bool] | None", ['{"rope": true}'], {"rope": True}),
        ("IntervalStrategy | str", ["steps"], "steps"),
    ],
)
def test_a_flag_has_the_type_of_its_field(annotation, words, value):
    parsed = parse_flag(annotation, words)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "annotation, word, expected",
    [
        ("int", "1.5", "expected an integer, got '1.5'"),
        ("float", "fast", "expected a number, got 'fast'"),
        ("bool", "maybe", "expected true or false, got 'maybe'"),
        ("Literal['a', 'b']", "c", "expected one of a, b, got 'c'"),
        ("list[int]", "wide", "expected an integer, got 'wide'"),
        ("dict", "[1]", "expected a JSON object, got '[1]'"),
    ],
)
def test_a_flag_of_another_type_is_refused(annotation, word, expected):
    with pytest.raises(argparse.ArgumentError, match=expected.replace("[", r"\[")):
        parse_flag(annotation, [word])


def test_the_guides_flags_are_understood():
    assert parse(*"train-tokenizer --data_path a.parquet --batch_size 16 --epochs 5 --save_every 500".split()) == {
        "data_path": "a.parquet",
        "per_device_train_batch_size": 16,
        "num_train_epochs": 5.0,
        "save_steps": 500.0,
    }


@pytest.mark.parametrize("order", ["{file} {flags}", "{flags} {file}"])
def test_flags_override_the_file(write, order):
    file = write({"data_path": "a.parquet", "learning_rate": 1e-4, "epochs": 2})
    line = order.format(file=file, flags="--learning_rate 1e-3")
    assert parse("train-tokenizer", *line.split()) == {
        "data_path": "a.parquet",
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
    }


def test_yaml_says_the_same_as_json(write):
    content = {"data_path": "a.parquet", "learning_rate": 1e-3, "bf16": True, "report_to": ["tensorboard"]}
    yaml = "data_path: a.parquet\nlearning_rate: 1e-3  # peak\nbf16: true\nreport_to: [tensorboard]\n"
    assert parse("train-tokenizer", write(yaml, "config.yaml")) == content
    assert parse("train-tokenizer", write(content)) == content


@pytest.mark.parametrize(
    "content, name, expected",
    [
        ({"data_path": "a", "lerning_rate": 1}, "c.json", 'unknown key "lerning_rate", did you mean learning_rate?'),
        ({"data_path": "a", "epoch": 1}, "c.json", 'unknown key "epoch", did you mean epochs?'),
        ({"data_path": 3}, "c.json", "data_path is 3, expected text"),
        ({"data_path": None}, "c.json", "data_path is null, expected text"),
        ({"seed": "42"}, "c.json", 'seed is "42", expected an integer'),
        ({"seed": True}, "c.json", "seed is true, expected an integer"),
        ({"bf16": 1}, "c.json", "bf16 is 1, expected true or false"),
        ({"label_names": ["a", 1]}, "c.json", "label_names is ['a', 1], expected a list of text or null"),
        ({"epochs": 1, "num_train_epochs": 2}, "c.json", "num_train_epochs is given twice"),
        ("eval_strategy: no\n", "c.yaml", "eval_strategy is false, expected text"),
        ("a: [1\n", "c.yaml", "while parsing a flow sequence"),
        ("{'seed': 1}", "c.json", "Expecting property name enclosed in double quotes: line 1 column 2"),
        ("[1]", "c.json", "expected keys and values, got [1]"),
        ("seed = 1", "c.toml", "expected a name that ends in .json, .yaml or .yml"),
    ],
)
def test_a_wrong_file_is_refused_by_name(capsys, write, content, name, expected):
    path = write(content, name)
    assert f"unitok-hf train-tokenizer: error: {path}: {expected}" in refusal(capsys, "train-tokenizer", path)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("--learning_rat 1", "unknown argument --learning_rat, did you mean --learning_rate?"),
        ("--seed=x", "argument --seed: expected an integer, got 'x'"),
        ("--seed", "argument --seed: expected one argument"),
        ("nowhere.json", "No such file or directory: 'nowhere.json'"),
        ("a.json b.json", "unknown argument b.json"),
        ("--seed 1", "--data_path is missing"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, line, expected):
    assert expected in refusal(capsys, "train-tokenizer", *line.split())


def test_a_command_without_a_file_refuses_one(capsys, write):
    assert "unknown argument" in refusal(capsys, "prepare-data", write({}))


def test_what_goes_wrong_at_work_is_one_line_too(capsys, tmp_path):
    line = ["prepare-data", "--folder", str(tmp_path / "nowhere"), "--output_file", str(tmp_path / "out.parquet")]
    assert str(tmp_path / "nowhere") in refusal(capsys, *line)


def test_debugging_shows_the_traceback():
    result = run("unitok_hf_cli", "train", "nowhere.json", UNITOK_HF_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "FileNotFoundError" in result.stderr


def test_an_interrupt_ends_with_130(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    command = [sys.executable, "-m", "unitok_hf_cli", "train", str(tmp_path / "config.json")]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts with & ignores it
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listening) as process:
        with open(tmp_path / "config.json", "w"):  # returns when the command reads from the other end
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "unitok-hf train: interrupted\n"


def test_launchers_can_start_it_as_a_module():
    """As torchrun does: `torchrun -m unitok_hf.training.cli train ...`"""
    result = run("unitok_hf.training.cli", "prepare-data", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout == run("unitok_hf_cli", "prepare-data", "--help").stdout
