"""The rules by which folders at the root are subpackages of `unitok_hf`, and what gets installed."""

import ast
import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("modeling_unitok", "configuration", "processing", "training", "model_cards")
MODEL_SIDE = ("modeling_unitok", "configuration", "processing")
SOURCES = sorted(path for folder in (*FOLDERS, "unitok_hf") for path in (ROOT / folder).rglob("*.py"))
OTHERS = sorted(
    [*ROOT.glob("*.py"), *(path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))]
)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, relative ones as they are under `unitok_hf`."""
    folder = path.parent.relative_to(ROOT).parts
    package = ".".join(folder if folder[:1] == ("unitok_hf",) else ("unitok_hf", *folder))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def test_no_file_imports_a_folder_by_its_bare_name():
    """With the root on sys.path that would work, and make a second copy of every class."""
    found = {
        (path.name, name) for path in SOURCES + OTHERS for name in imported(path) if name.split(".")[0] in FOLDERS
    }
    assert not found


def test_the_model_side_never_imports_from_training():
    model_side = [path for path in SOURCES if path.parent.name in MODEL_SIDE]
    assert model_side
    assert not {
        (path.name, name) for path in model_side for name in imported(path) if name.startswith("unitok_hf.training")
    }


def test_imports_between_our_files_name_a_file():
    """`from ..configuration.configuration_unitok import X`, never `from ..configuration import X`."""
    names = {(path.name, name) for path in SOURCES for name in imported(path) if name.startswith("unitok_hf.")}
    assert names
    files = {path.relative_to(ROOT).with_suffix("").parts for path in SOURCES}
    files = {".".join(parts if parts[0] == "unitok_hf" else ("unitok_hf", *parts)) for parts in files}
    assert not {(path, name) for path, name in names if name not in files}


def test_file_names_are_unique_over_all_folders():
    """They end up in one flat folder on the Hub."""
    stems = Counter(path.stem for path in SOURCES if path.stem != "__init__")
    assert stems
    assert not [stem for stem, count in stems.items() if count > 1]


def test_every_folder_is_mapped_and_a_package():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    [mapped] = [ast.literal_eval(node.value) for node in setup.body if ast.unparse(node).startswith("FOLDERS = ")]
    assert mapped == FOLDERS
    assert all((ROOT / folder / "__init__.py").is_file() for folder in FOLDERS)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of the wheel and the sdist made of the committed files."""
    tmp_path = tmp_path_factory.mktemp("build")
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={checkout}/"], cwd=ROOT, check=True)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--target", tools, *requires], check=True)
    build = "from setuptools import build_meta as b; b.build_sdist('../built'); b.build_wheel('../built')"
    (tmp_path / "built").mkdir()
    subprocess.run(
        [sys.executable, "-c", build], cwd=checkout, env=os.environ | {"PYTHONPATH": str(tools)}, check=True
    )
    return tmp_path / "built"


@pytest.mark.slow
def test_the_wheel_holds_our_package_and_nothing_else(built):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [entry_points] = [archive.read(name) for name in archive.namelist() if name.endswith("entry_points.txt")]
    ours = {path.relative_to(ROOT) for path in SOURCES}
    ours = {str(path if path.parts[0] == "unitok_hf" else "unitok_hf" / path) for path in ours}
    cards = {f"unitok_hf/model_cards/{path.name}" for path in (ROOT / "model_cards").glob("*.md")}
    assert cards and names == {"unitok_hf_cli.py", "unitok_hf/py.typed", *ours, *cards}
    assert entry_points.decode().split("\n")[:2] == ["[console_scripts]", "unitok-hf = unitok_hf_cli:main"]


@pytest.mark.slow
def test_the_sdist_holds_every_committed_file(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert set(tracked) - names <= {".gitignore"}


@pytest.mark.slow
def test_an_installed_wheel_works_far_from_the_checkout(built, tmp_path):
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(pip, check=True)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    import_all = "import unitok_hf, unitok_hf.training.data as data; print(unitok_hf.__file__, data.__file__)"
    for command in (["-m", "unitok_hf_cli", "prepare-data", "--help"], ["-c", import_all]):
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path / "site" / "unitok_hf")) == 2
