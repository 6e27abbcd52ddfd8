"""Transformers' own tests of models, importable as `transformers_tests`.

    source distribution of the installed version, from the package index    build/conformance/transformers-X.Y.Z.tar.gz
    its `tests/`, unpacked under another name                               build/conformance/X.Y.Z/transformers_tests/

- fetched once for each version, by pip; afterwards no network is needed
- the distribution ships the mixins, but not every module they import: those get stand-ins, which hold the names that are
  imported and nothing to run. A module that a later version ships is used as it is
- a plugin of pytest, named on the command line: a conftest.py here would hide the one that all tests import from. The tests are
  not named `test_*.py`, so that `make test` passes them by
- nothing of it is committed: `build/` is ignored by git
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from PIL import Image


FOLDER = Path(__file__).resolve().parents[2] / "build" / "conformance"

MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_training_test",
    "torch_compile_test",
)

# What the shipped modules import from where, and what stands in for it.
STAND_INS = {
    "transformers_tests/__init__.py": "",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "transformers_tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "transformers_tests/distributed_testing_utils.py": "",
    # the pictures of its tests are on the Hub; one of ours takes their place
    "utils/fetch_hub_objects_for_ci.py": "from pathlib import Path\n\n\n"
    "def url_to_local_path(url):\n    return str(Path(__file__).with_name('picture.png'))\n",
}


def unpacked(version: str) -> Path:
    """The folder that holds `transformers_tests` of this version; fetched when it is not there.

    Raises:
        subprocess.CalledProcessError: pip could not get the source distribution.
    """
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    source = FOLDER / f"transformers-{version}.tar.gz"
    if not source.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", FOLDER, f"transformers=={version}"], check=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        with tarfile.open(source) as archive:
            tests = [member for member in archive if member.name.startswith(f"transformers-{version}/tests/")]
            archive.extractall(temporary, members=tests, filter="data")
        whole = Path(temporary) / version
        shutil.move(Path(temporary) / f"transformers-{version}" / "tests", whole / "transformers_tests")
        for name, text in STAND_INS.items():
            if not (whole / name).exists():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_text(text, encoding="utf-8")
        Image.linear_gradient("L").convert("RGB").save(whole / "utils" / "picture.png")
        whole.rename(folder)
    return folder


def make_importable() -> None:
    """Put `transformers_tests` of the installed transformers on the path, once."""
    folder = str(unpacked(transformers.__version__))
    if folder not in sys.path:
        sys.path.append(folder)


def pytest_configure(config):
    """As a plugin, `-p upstream`: their marks are known."""
    for mark in MARKS:
        config.addinivalue_line("markers", f"{mark}: of transformers")


def pytest_pycollect_makemodule(module_path, parent):
    """Nothing is fetched before a test is collected."""
    make_importable()
