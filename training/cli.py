"""Runs a command that `unitok_hf_cli` has understood. Launchers that start modules come in here:

torchrun --nproc_per_node 2 -m unitok_hf.training.cli train configs/unitok.json
"""

import importlib
from typing import Any

from unitok_hf_cli import main


def run(module: str, dataclass_name: str, function_name: str, values: dict[str, Any]) -> None:
    """Calls the function with the dataclass of these values; what they leave out has the dataclass's defaults.

    Args:
        module: relative to `unitok_hf`, such as "training.data"; it has both names.
    """
    work = importlib.import_module(f"unitok_hf.{module}")
    arguments = getattr(work, dataclass_name)(**values)
    getattr(work, function_name)(arguments)


if __name__ == "__main__":
    main()
