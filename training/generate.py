"""Writes and draws with a trained model.

    unitok-hf generate --checkpoint out/model --prompt "a red apple" --num_images 4 --guidance_scale 3
    unitok-hf generate --checkpoint out/model --image apple.png

What comes out, in a folder of its own below `--output_dir` (`out/generation/001`, `002`, …; no run overwrites another, and
the folder is there when all of it is):

    000.png, 001.png, …   the pictures
    sheet.png             all of them on one sheet
    text.txt              the text of every sample
    samples.jsonl         one line per sample: prompt, seed, text, files of its pictures, token ids

Sample n is drawn with the seed `--seed` + n, whatever is drawn beside it: with its prompt, that seed and the same options it
comes again alone, as far as batches of another size round alike.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedConfig

from ..configuration.configuration_unitok import UniTokConfig
from ..configuration.refusal_unitok import refused_in_words
from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from ..processing.image_processing_unitok import to_pictures
from ..processing.pixels import load_rgb
from ..processing.processing_unitok import UniTokProcessor
from .runs import folder_beside, take_number


@dataclass
class GenerateArguments:
    """Arguments of `generate`: a prompt, an image, or both.

    With a prompt alone, `--num_images` pictures of it are drawn. With an image, the model goes on after the image and the
    prompt, and writes and draws as it likes.
    """

    checkpoint: str = field(metadata={"help": "Folder or Hub id of a trained model."})
    prompt: list[str] | None = field(default=None, metadata={"help": "One or more texts to begin with."})
    image: str | None = field(default=None, metadata={"help": "A picture to begin with, before the prompt."})
    generation_mode: Literal["auto", "text", "image", "interleaved"] | None = field(
        default=None,
        metadata={"help": "What to generate. Default: one image per prompt; after --image, what the model likes."},
    )
    num_images: int = field(default=1, metadata={"help": "Samples per prompt."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens to add. Default: one image and 64 tokens of text."}
    )
    guidance_scale: float = field(default=3.0, metadata={"help": "Weight of the prompt in pictures; 1 for none."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature; 0 takes the likeliest token."})
    top_k: int = field(default=0, metadata={"help": "Sample among the so many likeliest codes; 0 for all."})
    batch_size: int = field(default=32, metadata={"help": "Samples that are generated at once."})
    seed: int = field(default=0, metadata={"help": "Seed of the first sample; the next one has the next seed."})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, mps, …; auto takes the best there is."})
    output_dir: str = field(default="out/generation", metadata={"help": "Folder in which the run gets its own."})

    def __post_init__(self):
        if self.prompt is None and self.image is None:
            raise ValueError("pass --prompt, --image, or both")
        for name in ("num_images", "max_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        last = self.seed + len(self.prompt or [""]) * self.num_images - 1
        if not 0 <= self.seed <= last < 2**63:
            raise ValueError(f"--seed and the seeds of the samples after the first lie in [0, 2**63), got {self.seed}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must not be negative, got {self.temperature}")


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" is the accelerator if there is one.

    Raises:
        ValueError: torch cannot use it.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error


def generators(device: torch.device, seed: int, count: int) -> list[torch.Generator]:
    """Randomness of so many samples, each with a seed of its own: this one, the next, and so on."""
    return [torch.Generator(device).manual_seed(seed + number) for number in range(count)]


def require_port(port: int) -> None:
    """Raises ValueError unless a server can listen on this port."""
    if not 0 < port < 65536:
        raise ValueError(f"--port must be from 1 to 65535, got {port}")


def read_config(checkpoint: str) -> dict:
    """The configuration of a model or tokenizer, in a folder or by Hub id, as its file has it.

    Raises:
        OSError: there is nothing at this path, and nothing that the Hub gives us by this name.
        ValueError: the file is malformed.
    """
    if not Path(checkpoint).exists() and checkpoint.count("/") != 1:
        raise FileNotFoundError(f"no model at {checkpoint}")
    try:
        with refused_in_words(f"the configuration of {checkpoint} is malformed"):
            config, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise FileNotFoundError(f"no model at {checkpoint}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration of {checkpoint} does not hold keys and values")
    return config


def require_model(checkpoint: str) -> None:
    """Raises ValueError unless a folder or Hub id is of a UniTok model; and as `read_config`."""
    config = read_config(checkpoint)
    if config.get("model_type") != UniTokConfig.model_type:
        kind = config.get("model_type") or config.get("_class_name") or "nothing we know"
        raise ValueError(f"{checkpoint} holds no UniTok model, but {kind}; `unitok-hf train` makes one")


def load_model(checkpoint: str, device: torch.device) -> tuple[UniTokForConditionalGeneration, UniTokProcessor]:
    """A trained model in evaluation mode, and its processor; raises as `require_model`."""
    require_model(checkpoint)
    with refused_in_words(f"the model in {checkpoint} cannot be loaded"):
        model, processor = (
            AutoModel.from_pretrained(checkpoint).to(device).eval(),
            AutoProcessor.from_pretrained(checkpoint),
        )
    model.require_tokenizer(processor.tokenizer)
    return model, processor


@torch.no_grad()
def generate(args: GenerateArguments) -> Path:
    """Generate as the arguments say; returns the folder that was written.

    Raises:
        OSError, ValueError: the model, the image or the device cannot be used.
    """
    device = pick_device(args.device)
    picture = None if args.image is None else load_rgb(args.image)
    model, processor = load_model(args.checkpoint, device)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    prompts = [prompt for prompt in args.prompt or [""] for _ in range(args.num_images)]
    mode = args.generation_mode or ("image" if picture is None else "auto")
    drawing = mode == "image"
    sampling = {"do_sample": args.temperature > 0}
    if args.max_tokens is not None:
        sampling["max_new_tokens"] = args.max_tokens
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_k": 0}
        sampling |= {"image_temperature": args.temperature, "image_top_k": args.top_k}

    samples = []
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="generating", unit="batch"):
        batch = prompts[start : start + args.batch_size]
        inputs = processor(
            text=batch,
            images=None if picture is None else [[picture]] * len(batch),
            generation_mode="image" if drawing else "text",
            return_tensors="pt",
        ).to(device)
        ids = model.generate(
            **inputs,
            generation_mode=mode,
            guidance_scale=args.guidance_scale,
            generator=generators(device, args.seed + start, len(batch)),
            **sampling,
        )
        if drawing:
            parts = [[image] for image in to_pictures(model.decode_image_tokens(ids))]
        else:
            ids = ids[:, inputs["input_ids"].shape[1] :]
            parts = processor.decode_mixed(ids, model, on_error="skip")
        samples += zip(batch, ids.tolist(), parts, strict=True)
    with folder_beside(args.output_dir) as beside:
        write_samples(samples, args.seed, beside)
        folder = take_number(beside)
    print(f"{len(samples)} samples in {folder}")
    return folder


def write_samples(samples: list[tuple[str, list[int], list[str | Image.Image]]], seed: int, folder: Path) -> None:
    """Pictures, sheet, text and JSON lines of samples, the first drawn with `seed`: prompt, ids, and their parts in order."""
    pictures, lines, texts = [], [], []
    for number, (prompt, ids, parts) in enumerate(samples):
        files = []
        for part in parts:
            if isinstance(part, Image.Image):
                files.append(f"{len(pictures):03d}.png")
                part.save(folder / files[-1])
                pictures.append(part)
        text = " ".join(part.strip() for part in parts if isinstance(part, str)).strip()
        texts.append(f"[{number}] {prompt} -> {text}" if text else f"[{number}] {prompt}")
        sample = {
            "sample": number,
            "prompt": prompt,
            "seed": seed + number,
            "text": text,
            "images": files,
            "token_ids": ids,
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    (folder / "text.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if pictures:
        columns = min(8, len(pictures))
        missing = -len(pictures) % columns
        blank = Image.new("RGB", pictures[0].size, "white")
        make_image_grid(pictures + [blank] * missing, (len(pictures) + missing) // columns, columns).save(
            folder / "sheet.png"
        )
