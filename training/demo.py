"""The whole loop on handwritten digits, in minutes on a laptop: `unitok-hf demo`.

    scikit-learn's 1,797 digits ── Parquet ── image tokenizer ── GPT ── drawings and captions, judged

What it leaves in `--output_dir`:

    digits-train.parquet, digits-test.parquet    1,400 digits to train on, 397 that nothing is fitted to
    tokenizer/, model/                           both models, as any run leaves them, with their cards
    report.png                                   real, reconstructed and drawn digits
    metrics.json                                 what was measured

The judge is a support vector classifier on the 8x8 pixels, fitted to real training digits only. `digit_accuracy` is the
share of drawings that it takes for the digit that was asked for; `caption_accuracy` the share of unseen digits of which
the model writes the right name, word for word.
"""

import json
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ..modeling_unitok.modeling_vq import UniTokVQModel
from ..processing.image_processing_unitok import to_pictures
from .cards import write_card
from .collators import read_rows, to_pixels
from .data import PrepareDataArguments, prepare_data
from .gpt_trainer import GPTTrainingArguments, train_gpt
from .reconstruction import ReconstructionMeter
from .vq_trainer import VQTrainingArguments, train_tokenizer


IMAGE_SIZE = 32  # the digits have 8x8 pixels; 64x64 would take four times as long and show no more
CAPTION = "a handwritten {label}"


@dataclass
class DemoArguments:
    """Arguments of `demo`."""

    output_dir: str = field(default="out/demo", metadata={"help": "Folder for data, models, report and metrics."})
    tokenizer_steps: int = field(default=1000, metadata={"help": "Training steps of the image tokenizer."})
    steps: int = field(default=1600, metadata={"help": "Training steps of the GPT."})
    drawings: int = field(default=20, metadata={"help": "Drawings of each digit."})
    guidance_scale: float = field(default=3.0, metadata={"help": "Weight of the prompt in the drawings."})
    seed: int = field(default=0, metadata={"help": "Seed of everything random."})

    def __post_init__(self):
        for name in ("tokenizer_steps", "steps", "drawings"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def demo(args: DemoArguments) -> dict:
    """Run the demo; returns what it wrote to `metrics.json`.

    An earlier run in the same folder is kept: it is renamed to `…-001` or the next free number.
    """
    out = Path(args.output_dir)
    if out.exists():
        earlier = next(name for n in count(1) if not (name := out.with_name(f"{out.name}-{n:03d}")).exists())
        out.rename(earlier)
        print(f"the earlier {out} is now {earlier}")
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str):
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - begin, 1)

    with stage("prepare data"):
        for split in ("train", "test"):
            prepare_data(
                PrepareDataArguments(
                    builtin="digits",
                    split=split,
                    caption_template=CAPTION,
                    image_size=IMAGE_SIZE,
                    output_file=str(out / f"digits-{split}.parquet"),
                )
            )
    common = {
        "data_path": str(out / "digits-train.parquet"),
        "eval_data_path": str(out / "digits-test.parquet"),
        "augment": "affine",
        "eval_strategy": "no",
        "save_strategy": "no",
        "seed": args.seed,
    }
    with stage("train tokenizer"):
        train_tokenizer(
            VQTrainingArguments(
                output_dir=str(out / "tokenizer"),
                image_size=IMAGE_SIZE,
                block_out_channels=[64, 128],
                num_vq_embeddings=128,
                latent_channels=8,
                max_steps=args.tokenizer_steps,
                **common,
            )
        )
    with stage("train model"):
        train_gpt(
            GPTTrainingArguments(
                output_dir=str(out / "model"),
                visual_tokenizer_path=str(out / "tokenizer"),
                visual_vocab_size=128,
                depth=4,
                hidden_size=192,
                per_device_train_batch_size=64,
                learning_rate=2e-3,
                text_loss_weight=4.0,  # the name of a digit is one token among twenty
                max_steps=args.steps,
                matrix_optimizer="adamw",
                train_sampling_strategy="random",  # all streams are of about one length
                **common,
            )
        )
    with stage("draw and caption"):
        train, test = read_rows(common["data_path"]), read_rows(common["eval_data_path"])
        real = torch.stack([to_pixels(picture) for picture in test["image"]])  # (397, 3, H, W)
        digits, names = np.array(test["label"]), test.features["label"].names
        vq_model = UniTokVQModel.from_pretrained(out / "tokenizer").eval()
        model, processor = (
            AutoModel.from_pretrained(out / "model").eval(),
            AutoProcessor.from_pretrained(out / "model"),
        )
        meter = ReconstructionMeter(vq_model, Accelerator())
        meter.update(real)
        with torch.no_grad():
            reconstructed = vq_model.decode_from_indices(vq_model.encode_to_indices(real)).sample
        asked = np.repeat(np.arange(10), args.drawings)
        drawn = draw(model, processor, [CAPTION.format(label=names[digit]) for digit in asked], args)
        captions = caption(model, processor, test["image"])
    with stage("judge"):
        judge = Judge(torch.stack([to_pixels(picture) for picture in train["image"]]), np.array(train["label"]))
        expected = [CAPTION.format(label=names[digit]) for digit in digits]
        metrics = {
            **meter.compute(),
            "classifier_accuracy_real": judge.accuracy(real, digits),
            "classifier_accuracy_reconstructed": judge.accuracy(reconstructed, digits),
            "digit_accuracy": judge.accuracy(drawn, asked),
            "caption_accuracy": float(np.mean([a == b for a, b in zip(captions, expected, strict=True)])),
        }
    drawn_well = {name: metrics[name] for name in ("digit_accuracy", "caption_accuracy")}
    write_card(out / "tokenizer", {name: metrics[name] for name in metrics if name not in drawn_well})
    write_card(out / "model", drawn_well)
    metrics |= {"seconds": seconds, "commit": commit()}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    report(real, reconstructed, drawn.unflatten(0, (10, args.drawings)), digits, captions, out / "report.png")
    print(json.dumps(metrics, indent=2))
    print(f"\nLook at {out / 'report.png'}, and draw some more:")
    print(f'  unitok-hf generate --checkpoint {out / "model"} --prompt "a handwritten three" --num_images 8')
    return metrics


def draw(model, processor, prompts: list[str], args: DemoArguments) -> torch.Tensor:
    """One drawing per prompt, (N, 3, H, W) in [-1, 1]."""
    inputs = processor(text=prompts, generation_mode="image", return_tensors="pt")
    ids = model.generate(
        **inputs,
        generation_mode="image",
        do_sample=True,
        image_temperature=0.9,
        guidance_scale=args.guidance_scale,
        generator=torch.Generator().manual_seed(args.seed),
    )
    return model.decode_image_tokens(ids)


def caption(model, processor, pictures: list[Image.Image]) -> list[str]:
    """The likeliest text after each picture."""
    inputs = processor(images=[[picture] for picture in pictures], return_tensors="pt")
    ids = model.generate(**inputs, generation_mode="text", max_new_tokens=16, do_sample=False)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]


class Judge:
    """A classifier of digits that has seen real training digits and nothing else.

    Args:
        pixels: (N, 3, H, W) in [-1, 1].
        digits: (N,) what they show.
    """

    def __init__(self, pixels: torch.Tensor, digits: np.ndarray):
        from sklearn.svm import SVC  # an extra of the package, needed here only

        self.classifier = SVC(gamma=0.001, C=10).fit(self.features(pixels), digits)

    @staticmethod
    def features(pixels: torch.Tensor) -> np.ndarray:
        """Pictures back at the 8x8 pixels and the range 0..16 of the data set, (N, 64)."""
        grey = (pixels.mean(dim=1, keepdim=True).clamp(-1, 1) + 1) * 8
        return torch.nn.functional.interpolate(grey, size=(8, 8), mode="area").flatten(1).numpy()

    def accuracy(self, pixels: torch.Tensor, digits: np.ndarray) -> float:
        """Share of pictures (N, 3, H, W) that are taken for these digits."""
        return float(np.mean(self.classifier.predict(self.features(pixels)) == digits))


def commit() -> str | None:
    """The git commit of this checkout; None where there is none."""
    try:
        asked = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def report(
    real: torch.Tensor,
    reconstructed: torch.Tensor,
    drawn: torch.Tensor,
    digits: np.ndarray,
    captions: list[str],
    path: Path,
) -> None:
    """One labelled picture: a real unseen digit of each kind with its caption, its reconstruction, eight drawings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [int(np.flatnonzero(digits == digit)[0]) for digit in range(10)]
    rows = [real[shown], reconstructed[shown], *drawn[:, :8].transpose(0, 1)]
    labels = ["real, unseen", "reconstructed\nfrom 16 tokens", "drawn from\nits name", *[""] * (len(rows) - 3)]
    figure, axes = plt.subplots(len(rows), 10, figsize=(12, 1.22 * len(rows)), dpi=100)
    for line, (label, pictures) in enumerate(zip(labels, rows, strict=True)):
        for column, picture in enumerate(to_pictures(pictures)):
            axis = axes[line, column]
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if line == 0:
                axis.set_title(captions[shown[column]].replace("a handwritten", "“a handwritten\n") + "”", fontsize=8)
        axes[line, 0].set_ylabel(label, fontsize=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(path)
    plt.close(figure)
