"""`unitok-hf COMMAND`: understands the command line before anything heavy is imported.

    unitok-hf train configs/unitok.json --learning_rate 1e-3

- A command is a dataclass of arguments and a function that takes it; COMMANDS says where both are.
- The flags are the fields of that dataclass. They are read from its source text, not by importing it, so that help and
  usage errors come at once; torch is imported when the arguments are known to be well formed.
- The training commands extend `transformers.TrainingArguments`: every field of it is a flag, too, and a JSON or YAML
  file may give the arguments; flags override it.
- What a user did wrong is one line on stderr and exit code 2. UNITOK_HF_DEBUG=1 shows the traceback.
"""

import argparse
import ast
import difflib
import importlib.util
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parent
# The rule of unitok_hf/__init__.py: in a checkout the folders are beside the package, in a wheel inside it.
SOURCES = ROOT if (ROOT / "modeling_unitok").is_dir() else ROOT / "unitok_hf"


class Command(NamedTuple):
    """A line of `unitok-hf --help`, and the module, dataclass and function below `unitok_hf` that do the work."""

    summary: str
    module: str
    arguments: str
    function: str


COMMANDS = {
    "prepare-data": Command(
        "write pictures and captions as Parquet", "training.data", "PrepareDataArguments", "prepare_data"
    ),
    "train-tokenizer": Command(
        "learn the codes of an image tokenizer", "training.vq_trainer", "VQTrainingArguments", "train_tokenizer"
    ),
    "encode": Command(
        "turn pictures into codes once, before training", "training.token_cache", "EncodeArguments", "encode"
    ),
    "train": Command(
        "train a GPT on text and image tokens", "training.gpt_trainer", "GPTTrainingArguments", "train_gpt"
    ),
    "generate": Command("write and draw with a trained model", "training.generate", "GenerateArguments", "generate"),
    "evaluate": Command("measure a tokenizer or a model", "training.evaluation", "EvaluateArguments", "evaluate"),
    "app": Command("draw, read and complete pictures on a page", "training.app", "AppArguments", "app"),
    "serve": Command("answer chats over HTTP with a trained model", "training.serve", "ServeArguments", "serve"),
    "export": Command("write a model or tokenizer for other programs", "training.export", "ExportArguments", "export"),
    "push": Command("share a model, a tokenizer or data on the Hub", "training.push", "PushArguments", "push"),
    "demo": Command("all of this on handwritten digits, in minutes", "training.demo", "DemoArguments", "demo"),
}

# Short names for fields of TrainingArguments, as flags and in files.
ALIASES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "save_every": "save_steps",
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name = commands_parser().parse_args(argv[:1] or ["--help"]).command
    command = COMMANDS[name]
    parser = Parser(prog=f"unitok-hf {name}", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    try:
        fields = add_arguments(parser, command)
        values = read_arguments(parser, fields, argv[1:])

        from unitok_hf.training.cli import run

        run(command.module, command.arguments, command.function, values)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except (ImportError, OSError, ValueError) as error:
        if os.environ.get("UNITOK_HF_DEBUG") == "1":
            raise
        parser.error(str(error) or type(error).__name__)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def commands_parser() -> Parser:
    """Understands the first word of the command line."""
    parser = Parser(
        prog="unitok-hf",
        description="One transformer over text and image tokens: data, training, generation, evaluation.",
        epilog="The arguments of a command: unitok-hf COMMAND --help",
    )
    source = (ROOT / "unitok_hf/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"', source, flags=re.MULTILINE)[1]
    parser.add_argument("--version", action="version", version=f"unitok-hf {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser


def add_arguments(parser: Parser, command: Command) -> dict[str, "Field"]:
    """Gives the parser the help and the flags of a command.

    Returns:
        the fields behind the flags, by name and by alias.
    """
    definition = read_class(SOURCES / f"{command.module.replace('.', '/')}.py", command.arguments)
    fields = own = read_fields(definition)
    trains = "TrainingArguments" in map(ast.unparse, definition.bases)

    parser.description = ast.get_docstring(definition).split("\n\n")[0]
    required = [
        field.name.upper() if field.positional else f"--{name} {field.metavar}"
        for name, field in own.items()
        if not field.default
    ]
    parser.usage = " ".join(["%(prog)s", *["[CONFIG_FILE]"] * trains, *required, "[--flag VALUE ...]"])
    for field in own.values():
        add_flag(parser, field, field.description)
    if trains:
        parser.add_argument(
            "config_file", metavar="CONFIG_FILE", nargs="?", help="JSON or YAML with any of these; flags override it"
        )
        inherited = read_fields(read_class(transformers_folder() / "training_args.py", "TrainingArguments"))
        inherited = {name: field for name, field in inherited.items() if name not in own and field.from_text}
        group = parser.add_argument_group(
            "the other fields of transformers.TrainingArguments",
            "https://huggingface.co/docs/transformers/main_classes/trainer explains " + " ".join(inherited),
        )
        for field in inherited.values():
            add_flag(group, field, argparse.SUPPRESS)
        fields = own | inherited
    return fields | {alias: fields[name] for alias, name in ALIASES.items() if name in fields}


def add_flag(parser: argparse._ActionsContainer, field: "Field", help: str) -> None:
    """A bool's flag may stand alone, which means true; a list's takes several values; some stand without a flag."""
    if field.positional:
        parser.add_argument(field.name, metavar=field.name.upper(), nargs="?", help=help.replace("%", "%%"))
        return
    names = [alias for alias, name in ALIASES.items() if name == field.name] + [field.name]
    options = {}
    if "bool" in field.kinds:
        options = {"nargs": "?", "const": True}
    elif field.is_list:
        options = {"nargs": "+"}
    parser.add_argument(
        *(f"--{name}" for name in names),
        dest=field.name,
        metavar=field.metavar,
        type=partial(read_text, field.from_text),
        help=help.replace("%", "%%"),
        **options,
    )


def read_arguments(parser: Parser, fields: dict[str, "Field"], argv: list[str]) -> dict[str, Any]:
    """The values that the command line and its file give, by field name.

    Raises:
        ValueError: an argument is unknown or missing, or the file is not what it should be.
    """
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ValueError(f"unknown argument {flag}{suggestion(flag, [f'--{name}' for name in fields])}")
    values = vars(namespace)
    if "config_file" in values:
        values = read_file(Path(values.pop("config_file")), fields) | values
    for field in fields.values():
        if not field.default and field.name not in values:
            name = field.name.upper() if field.positional else f"--{field.name}"
            raise ValueError(f"{name} is missing: {field.help}")
    return values


def read_file(path: Path, fields: dict[str, "Field"]) -> dict[str, Any]:
    """The values of a JSON or YAML file, by field name."""
    try:
        content = parse_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error
    if type(content) is not dict:
        raise ValueError(f"{path}: expected keys and values, got {in_json(content)}")
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise ValueError(f"{path}: unknown key {in_json(key)}{suggestion(str(key), fields)}")
        field = fields[key]
        if not any(fits(kind, value) for kind in field.kinds):
            raise ValueError(f"{path}: {key} is {in_json(value)}, expected {in_words(field.kinds)}")
        if field.name in values:
            raise ValueError(f"{path}: {field.name} is given twice")
        values[field.name] = value
    return values


def parse_file(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError("expected a name that ends in .json, .yaml or .yml")

    import yaml

    class Loader(yaml.SafeLoader):
        """Reads 1e-3 as the number that YAML 1.2 says it is; to PyYAML it is text."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d.]+[eE][-+]?\d+$"), "+-.0123456789")
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def suggestion(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]}?" if close else ""


def in_json(value: Any) -> str:
    """A value as JSON has it, shortened; YAML can write one that would be larger than any memory, by reference."""
    if isinstance(value, dict | list):
        return reprlib.repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


class Field(NamedTuple):
    """A dataclass field as its source states it.

    Args:
        kinds: the alternatives of the annotation; `list[str] | None` is ["list[str]", "None"].
        default: source text; "" if a value must be given.
        help: "" if the source has no plain text there.
        positional: whether it is given by its place, without a flag.
    """

    name: str
    kinds: list[str]
    default: str
    help: str
    positional: bool = False

    @property
    def is_list(self) -> bool:
        return all(base(kind) in ("list", "None") for kind in self.kinds)

    @property
    def from_text(self) -> list[str]:
        """The kinds that one word of the flag may be read as; none for what only Python can make."""
        kinds = [inside(kind) if self.is_list else kind for kind in self.kinds]
        return [kind for kind in kinds if base(kind) in KINDS]

    @property
    def metavar(self) -> str:
        kind = self.from_text[0]
        return f"{{{','.join(choices(kind))}}}" if base(kind) == "Literal" else base(kind).upper()

    @property
    def description(self) -> str:
        note = {"": " (required)", "None": "", "False": ""}.get(self.default, f" (default: {self.default})")
        return self.help + note


def transformers_folder() -> Path:
    found = importlib.util.find_spec("transformers")
    if found is None:
        raise ImportError(f"transformers is not installed in {sys.prefix}")
    return Path(found.origin).parent


def read_class(path: Path, name: str) -> ast.ClassDef:
    module = ast.parse(path.read_text(encoding="utf-8"))
    [definition] = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return definition


def read_fields(definition: ast.ClassDef) -> dict[str, Field]:
    """The fields that a dataclass adds to those of its bases, in order."""
    fields = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            default, help, positional = node.value, "", False
            if isinstance(default, ast.Call):  # field(default=..., metadata={"help": ...})
                options = {keyword.arg: keyword.value for keyword in default.keywords}
                factory = options.get("default_factory")
                default = factory.body if isinstance(factory, ast.Lambda) else options.get("default", factory)
                metadata = options.get("metadata", ast.Dict([], []))
                for key, value in zip(metadata.keys, metadata.values, strict=True):
                    if key.value == "help" and isinstance(value, ast.Constant):
                        help = value.value
                    if key.value == "positional":
                        positional = value.value
            name, kinds = node.target.id, alternatives(node.annotation)
            fields[name] = Field(name, kinds, ast.unparse(default) if default else "", help, positional)
    return fields


def alternatives(annotation: ast.expr) -> list[str]:
    if isinstance(annotation, ast.BinOp):
        return alternatives(annotation.left) + alternatives(annotation.right)
    return [ast.unparse(annotation)]


# A kind is a piece of an annotation, as text: "int", "None", "dict[str, Any]", "list[str]", "Literal['a', 'b']".


class Kind(NamedTuple):
    """What a kind is called in messages, its types in a file, and what reads it from the text of a flag."""

    words: str
    types: tuple[type, ...]
    read: Callable[[str], Any]


KINDS = {
    "Literal": Kind("one of", (str,), str),
    "bool": Kind("true or false", (bool,), lambda text: json.loads(text.lower())),
    "int": Kind("an integer", (int,), int),
    "float": Kind("a number", (int, float), float),
    "dict": Kind("a JSON object", (dict,), json.loads),
    "str": Kind("text", (str,), str),
}


def base(kind: str) -> str:
    return kind.partition("[")[0]


def inside(kind: str) -> str:
    return kind.partition("[")[2].removesuffix("]")


def choices(kind: str) -> list:
    return ast.literal_eval(f"[{inside(kind)}]")


def fits(kind: str, value: Any) -> bool:
    """Whether a value, of the type that JSON gives it, is of this kind."""
    if kind == "None":
        return value is None
    if base(kind) == "list":
        return type(value) is list and all(fits(inside(kind), item) for item in value)
    if base(kind) == "Literal":
        return value in choices(kind)
    return base(kind) in KINDS and type(value) in KINDS[base(kind)].types


def in_words(kinds: list[str]) -> str:
    words = []
    for kind in kinds:
        if kind == "None":
            words.append("null")
        elif base(kind) == "list":
            words.append(f"a list of {in_words([inside(kind)])}")
        elif base(kind) == "Literal":
            words.append(f"{KINDS['Literal'].words} {', '.join(map(str, choices(kind)))}")
        elif base(kind) in KINDS:
            words.append(KINDS[base(kind)].words)
    return " or ".join(words)


def read_text(kinds: list[str], text: str) -> Any:
    """The value that the text of a flag stands for, as the first kind that can be read from it."""
    for kind in sorted(kinds, key="str".__eq__):  # text can always be read: last
        try:
            value = KINDS[base(kind)].read(text)
        except ValueError:
            continue
        if fits(kind, value):
            return value
    raise argparse.ArgumentTypeError(f"expected {in_words(kinds)}, got {text!r}")


if __name__ == "__main__":
    main()
