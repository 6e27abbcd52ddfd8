"""The card of a released tokenizer or model, filled from what training left in its folder.

    config.json, *.safetensors    architecture and size
    eval_results.json             what was measured, also as `model-index` for the Hub
    training_args.json            arguments; of paths only the last part is told
    samples/                      the newest drawings of the evaluation prompts, cut apart for the gallery

The templates are in model_cards/. Training leaves a card beside the model, whose snippets load it from its folder; when it is
shared, the card is made again, with the name it has then. MARK in its last line says that it may be: a card without that line
is somebody's work, and stays.
"""

import io
import json
import math
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from safetensors import safe_open

from ..configuration.configuration_unitok import UniTokConfig
from ..modeling_unitok.modeling_vq import UniTokVQModel
from .runs import write_beside


ARGUMENTS = (
    "data_path", "model_path", "visual_tokenizer_path", "vq_model_path", "augment", "image_first", "caption_dropout",
    "quantizer", "codebook_norm", "gradient_estimator", "reconstruction_loss", "commitment_weight", "perceptual_weight",
    "adversarial_weight", "weight_ema_decay", "matrix_optimizer", "lora_rank", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "weight_decay",
    "bf16", "seed",
)  # fmt: skip
WEIGHTS = ("model*.safetensors", "diffusion_pytorch_model*.safetensors")
GALLERY_SCALE = 4  # tiny pictures are shown larger, pixel by pixel
MARK = "<!-- Made by unitok-hf, and made again when the model is shared. Remove this line to keep what you write. -->"


def read_json(path: Path) -> dict:
    """The content of a JSON file; {} when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def training_arguments(folder: Path) -> dict[str, object]:
    """The arguments that a reader wants to know, without those that were left at nothing."""
    found = read_json(folder / "training_args.json")
    values = {name: found[name] for name in ARGUMENTS if found.get(name) not in (None, "none", 0, False)}
    return {name: Path(value).name if name.endswith("_path") else value for name, value in values.items()}


def count_parameters(folder: Path, prefix: str = "") -> str:
    """Millions of parameters in the safetensors files, of those whose names begin so."""
    total = 0
    for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                if name.startswith(prefix):
                    total += math.prod(file.get_slice(name).get_shape())
    return f"{total / 1e6:.1f} M"


def gallery(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Name of a file, prompt and PNG, of the newest drawings."""
    sheets = sorted((folder / "samples").glob("step_*.png"))
    prompts = folder / "samples" / "prompts.json"
    if not sheets or not prompts.is_file():
        return {}
    sheet, texts = Image.open(sheets[-1]).convert("RGB"), read_json(prompts)
    side = sheet.width // len(texts)
    pictures = {}
    for number, text in enumerate(texts):
        picture = sheet.crop((number * side, 0, (number + 1) * side, side))
        picture = picture.resize((GALLERY_SCALE * side,) * 2, Image.Resampling.NEAREST)
        with io.BytesIO() as buffer:
            picture.save(buffer, "PNG")
            pictures[f"samples/{number}.png"] = (text, buffer.getvalue())
    return pictures


def is_ours(folder: Path) -> bool:
    """Whether a folder has no card, or one that may be made again."""
    card = folder / "README.md"
    return not card.is_file() or MARK in card.read_text(encoding="utf-8")


def write_card(folder: str | Path, measures: dict[str, float] | None = None) -> None:
    """Leave a card and the pictures of its gallery beside a saved tokenizer or model, unless somebody has written one.

    Args:
        folder: what was saved.
        measures: what was measured besides; kept in `eval_results.json`.
    """
    folder = Path(folder)
    if measures:
        results = read_json(folder / "eval_results.json") | {f"eval_{name}": value for name, value in measures.items()}
        write_beside(folder / "eval_results.json", json.dumps(results, indent=4, sort_keys=True).encode())
    if is_ours(folder):
        for name, (_, picture) in gallery(folder).items():
            write_beside(folder / name, picture)
        write_beside(folder / "README.md", card(folder, str(folder)).encode())


def card(folder: str | Path, repo: str, license: str | None = None) -> str:
    """The text of the card of a saved tokenizer or model.

    Args:
        folder: what was saved.
        repo: how the snippets call it, "owner/name" or a folder.
        license: identifier as the Hub knows it, such as "apache-2.0".

    Raises:
        FileNotFoundError: there is neither a tokenizer nor a model.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not config:
        raise FileNotFoundError(f"no tokenizer or model at {folder}")
    found = {name.removeprefix("eval_"): value for name, value in read_json(folder / "eval_results.json").items()}
    measures = {name: value for name, value in found.items() if name != "epoch"}
    arguments = training_arguments(folder)
    data = read_json(folder / "training_args.json")
    source = data.get("eval_data_path") or data.get("data_path")
    evaluated_on = "pictures held out of the training data"
    if data.get("eval_data_path"):
        evaluated_on = Path(data["eval_data_path"]).name
    is_tokenizer = "_class_name" in config
    results = [
        EvalResult(
            task_type="image-to-image" if is_tokenizer else "any-to-any",
            dataset_type=Path(source).stem if source else "unknown",
            dataset_name=Path(source).stem if source else "unknown",
            metric_type=name,
            metric_value=value,
        )
        for name, value in measures.items()
    ]
    values = {
        "name": repo.rstrip("/").split("/")[-1],
        "repo": repo,
        "repo_folder": repo.rstrip("/").split("/")[-1],
        "license": license,
        "measures": {name: f"{value:.4g}" for name, value in measures.items()},
        "evaluated_on": evaluated_on,
        "arguments": arguments,
        "parameters": count_parameters(folder),
    }
    values |= _about_tokenizer(config) if is_tokenizer else _about_model(config, folder)
    pictures = {} if is_tokenizer else gallery(folder)
    widget = [{"text": text, "output": {"url": name}} for name, (text, _) in pictures.items()]
    about = ModelCardData(
        license=license,
        library_name="diffusers" if is_tokenizer else "transformers",
        pipeline_tag="image-feature-extraction" if is_tokenizer else "any-to-any",
        tags=["unitok", "vqgan", "image-tokenizer"] if is_tokenizer else ["unitok", "image-generation", "any-to-any"],
        model_name=values["name"],
        eval_results=results or None,
        **({"widget": widget} if widget else {}),
    )
    prompts = [text for text, _ in pictures.values()] or ["a picture"]
    template = files("unitok_hf.model_cards").joinpath("tokenizer.md" if is_tokenizer else "model.md")
    text = ModelCard.from_template(
        about,
        template_str=template.read_text(encoding="utf-8"),
        gallery=bool(pictures),
        prompt=json.dumps(prompts[0], ensure_ascii=False),
        **values,
    )
    return f"{str(text).rstrip()}\n\n{MARK}\n"


def _about_tokenizer(config: dict) -> dict[str, object]:
    factor = config.get("patch_size", 1) * 2 ** (len(config["block_out_channels"]) - 1)
    side = config["sample_size"] // factor
    return _about_grid(config["sample_size"], side, side, config["num_vq_embeddings"]) | {
        "downsampling": factor,
        "patch_size": config.get("patch_size", 1),
    }


def _about_model(config: dict, folder: Path) -> dict[str, object]:
    config = UniTokConfig.from_dict(config)
    rows, columns = config.image_grid
    with torch.device("meta"):
        size = UniTokVQModel(**{"num_vq_embeddings": config.num_visual_tokens} | config.vq_config).config.sample_size
    return _about_grid(size, rows, columns, config.num_visual_tokens) | {
        "text_model": config.text_config.model_type,
        "text_rows": config.text_vocab_size,
        "vq_parameters": count_parameters(folder, "model.vqmodel."),
    }


def _about_grid(size: int, rows: int, columns: int, codes: int) -> dict[str, object]:
    tokens = rows * columns
    return {
        "size": size, "rows": rows, "columns": columns, "tokens": tokens, "codes": codes,
        "bits": round(tokens * math.log2(codes)),
    }  # fmt: skip
