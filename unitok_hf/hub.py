"""Makes a saved model loadable with `trust_remote_code=True` where `unitok_hf` is not installed.

The Hub's loader copies the files that a module reaches by `from .name import …` in its own folder, and nothing else. So the
model-side files are laid flat beside the weights, with the imports that cross our folders rewritten:

    from ..configuration.configuration_unitok import UniTokConfig    ->    from .configuration_unitok import UniTokConfig

and the `auto_map` of each configuration file names the classes. An installed package always wins over such code.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
from pathlib import Path


MODEL = "modeling_unitok.UniTokForConditionalGeneration"
AUTO_MAP = {
    "config.json": {
        "AutoConfig": "configuration_unitok.UniTokConfig",
        "AutoModel": MODEL,
        "AutoModelForCausalLM": MODEL,
        "AutoModelForImageTextToText": MODEL,
        "AutoModelForMultimodalLM": MODEL,
    },
    "processor_config.json": {
        "AutoProcessor": "processing_unitok.UniTokProcessor",
        "AutoImageProcessor": "image_processing_unitok.UniTokImageProcessor",
    },
}
ENTRY_POINTS = (
    "unitok_hf.configuration.configuration_unitok",
    "unitok_hf.modeling_unitok.modeling_unitok",
    "unitok_hf.processing.processing_unitok",
)
RELATIVE_IMPORT = re.compile(r"^(\s*)from (\.+[\w.]+) import", flags=re.MULTILINE)


def remote_code(folder: str | os.PathLike) -> dict[str, bytes]:
    """The files that a saved model needs to be loadable without the package, by name.

    Args:
        folder: with `config.json` and, unless there is no processor, `processor_config.json`.

    Returns:
        the code, and these two files with their `auto_map`.
    """
    files: dict[str, bytes] = {}
    pending = list(ENTRY_POINTS)
    while pending:
        name = pending.pop()
        package, _, stem = name.rpartition(".")
        if f"{stem}.py" in files:
            continue

        def flatten(match: re.Match, package: str = package) -> str:
            target = importlib.util.resolve_name(match[2], package)
            pending.append(target)
            return f"{match[1]}from .{target.rpartition('.')[2]} import"

        source = inspect.getsource(importlib.import_module(name))
        files[f"{stem}.py"] = RELATIVE_IMPORT.sub(flatten, source).encode()
    for name, auto_map in AUTO_MAP.items():
        path = Path(folder) / name
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto_map}
            if name == "processor_config.json":  # the image processor is written inside, and looked for there, too
                content["image_processor"] |= {"auto_map": {"AutoImageProcessor": auto_map["AutoImageProcessor"]}}
            files[name] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return files


def save_remote_code(folder: str | os.PathLike) -> None:
    """Add code to a saved model, so that it loads with `trust_remote_code=True` and no installed package.

    Args:
        folder: where `model.save_pretrained` and `processor.save_pretrained` have written.

    Raises:
        FileNotFoundError: there is no saved model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no saved model at {folder}; call model.save_pretrained({str(folder)!r}) first")
    for name, content in remote_code(folder).items():
        beside = folder / f".{name}"
        beside.write_bytes(content)
        os.replace(beside, folder / name)
