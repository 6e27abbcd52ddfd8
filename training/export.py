"""Exports for programs that do not know this package.

    unitok-hf export --checkpoint out/model --output_dir out/plain             a plain causal language model, NanoChat's say
    unitok-hf export --checkpoint out/model --output_dir out/onnx --to onnx    encoder.onnx, decoder.onnx: the image tokenizer

- text_model: the language model with its head over text and codes, and the text tokenizer; its logits are ours. Engines that
  serve text models take it; README.md in the folder says which ids are codes, and how a picture is drawn with them
- onnx: pixel_values (B, 3, H, W) float32 in [-1, 1] -> codes (B, h, w) int64, and back, for pictures of the training size and
  up to 63 at once (diffusers' upsampling takes another path from 64 on)

Both are proved before they are there: loaded again from the folder, by transformers and by onnxruntime, they must compute
what our model computes, or nothing is written.
"""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..modeling_unitok.modeling_unitok import UniTokForConditionalGeneration
from ..modeling_unitok.modeling_vq import UniTokVQModel
from ..processing.processing_unitok import UniTokProcessor
from .generate import load_model, read_config
from .runs import save_beside


LARGEST_BATCH = 63


@dataclass
class ExportArguments:
    """Arguments of `export`."""

    checkpoint: str = field(
        metadata={"help": "Folder or Hub id of a trained model; for onnx also of an image tokenizer."}
    )
    output_dir: str = field(metadata={"help": "New folder for what is exported."})
    to: Literal["text_model", "onnx"] = field(
        default="text_model", metadata={"help": "A plain causal language model, or the image tokenizer in ONNX."}
    )


def export(args: ExportArguments) -> None:
    """Export as the arguments say.

    Raises:
        OSError, ValueError: there is nothing to export, or the folder holds files; or what was exported computes something
            else, and then nothing is written.
        ImportError: ONNX or onnxruntime is not installed.
    """
    out = Path(args.output_dir)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} already holds files; choose another folder")
    if args.to == "onnx":
        vq_model = tokenizer_of(args.checkpoint)
        save_beside(str(out), lambda folder: export_onnx(vq_model, Path(folder)))
    else:
        model, processor = load_model(args.checkpoint, torch.device("cpu"))
        save_beside(str(out), lambda folder: export_text_model(model, processor, Path(folder)))
    print(out)


def tokenizer_of(checkpoint: str) -> UniTokVQModel:
    """The image tokenizer of its own folder or repository, or of a model's."""
    if "_class_name" in read_config(checkpoint):
        return UniTokVQModel.from_pretrained(checkpoint).eval()
    model, _ = load_model(checkpoint, torch.device("cpu"))
    return model.model.vqmodel


@torch.no_grad()
def plain_text_model(model: UniTokForConditionalGeneration) -> PreTrainedModel:
    """The causal language model of transformers that computes the same logits, with copies of the weights."""
    text_model = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype).eval()
    text_model.base_model.load_state_dict(model.model.language_model.state_dict())
    text_model.get_output_embeddings().weight.copy_(model.lm_head.weight)
    text_model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    return text_model


@torch.no_grad()
def export_text_model(model: UniTokForConditionalGeneration, processor: UniTokProcessor, folder: Path) -> None:
    """Write `plain_text_model`, the text tokenizer and a card into a folder.

    Raises:
        ValueError: what was written computes other logits.
    """
    text_model = plain_text_model(model)
    text_model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    card = text_model_card(model, type(text_model).__name__)
    (folder / "README.md").write_text(card, encoding="utf-8")
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    ids[ids == model.config.image_token_id] = model.config.bos_token_id
    ours = model(input_ids=ids).logits.float()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()(input_ids=ids).logits.float()
    # ours caps logits in fp32, transformers in the model's dtype
    rounding = 1e-5 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(ours, theirs, atol=rounding):
        raise ValueError(
            f"{type(text_model).__name__} computes other logits (largest difference {(ours - theirs).abs().max():.3g}); "
            "nothing was exported"
        )


def text_model_card(model: UniTokForConditionalGeneration, text_model: str) -> str:
    """What somebody has to know who has ids, and no package that explains them."""
    config, (rows, columns) = model.config, model.vocabulary.grid
    about = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["unitok"])
    template = files("unitok_hf.model_cards").joinpath("text_model.md").read_text(encoding="utf-8")
    values = {
        "text_model": text_model, "offset": config.text_vocab_size, "end": config.vocab_size,
        "codes": config.num_visual_tokens, "rows": rows, "columns": columns, "tokens": rows * columns,
        "bos": config.bos_token_id, "image_start": config.image_start_token_id,
        "image_end": config.image_end_token_id, "uncond": config.uncond_token_id,
    }  # fmt: skip
    return str(ModelCard.from_template(about, template_str=template, **values))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to codes (B, h, w): `encode_to_indices` in one piece, without the slices of its lookup."""

    def __init__(self, vq_model: UniTokVQModel):
        super().__init__()
        self.vq_model = vq_model
        codebook = vq_model.codebook.detach().float()
        self.centre = codebook.mean(dim=0)
        self.codebook = codebook - self.centre  # (K, d)
        self.bias = -0.5 * self.codebook.square().sum(dim=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        latents = self.vq_model.encode(pixel_values).latents.permute(0, 2, 3, 1).float()  # (B, h, w, d)
        return ((latents - self.centre) @ self.codebook.T + self.bias).argmax(dim=-1)


class Decoder(nn.Module):
    """Codes (B, h, w) to pictures (B, 3, H, W)."""

    def __init__(self, vq_model: UniTokVQModel):
        super().__init__()
        self.vq_model = vq_model

    def forward(self, codes: torch.LongTensor) -> torch.Tensor:
        latents = self.vq_model.codebook[codes].permute(0, 3, 1, 2)  # (B, d, h, w)
        return self.vq_model.decode(latents, force_not_quantize=True).sample


@torch.no_grad()
def export_onnx(vq_model: UniTokVQModel, folder: Path) -> None:
    """Write `encoder.onnx` and `decoder.onnx` of an image tokenizer in evaluation mode into a folder.

    Raises:
        ValueError: more than one code in a thousand differs in onnxruntime, or a pixel by more than 1e-3.
        ImportError: ONNX or onnxruntime is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch.onnx needs it
    except ImportError as error:
        raise ImportError(f"ONNX is not installed ({error.name}): pip install 'unitok-hf[export]'") from error

    size = vq_model.config.sample_size
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = vq_model.encode_to_indices(pixels)
    pictures = vq_model.decode_from_indices(codes).sample
    found = []
    for name, part, given, (reads, writes) in (
        ("encoder", Encoder(vq_model), pixels, ("pixel_values", "codes")),
        ("decoder", Decoder(vq_model), codes, ("codes", "pixel_values")),
    ):
        path = folder / f"{name}.onnx"
        torch.onnx.export(
            part.eval(),
            (given,),
            path,
            input_names=[reads],
            output_names=[writes],
            dynamic_shapes=({0: torch.export.Dim("batch", max=LARGEST_BATCH)},),
            external_data=False,
            dynamo=True,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        one, three = (torch.from_numpy(session.run(None, {reads: batch.numpy()})[0]) for batch in (given[:1], given))
        found.append(three)
        if not torch.allclose(one.float(), three[:1].float(), atol=1e-3):
            raise ValueError(
                f"{name}.onnx computes something else for one picture than for three; nothing was exported"
            )
    wrong = (found[0] != codes).float().mean().item()
    off = (found[1] - pictures).abs().max().item()
    if wrong > 1e-3 or off > 1e-3:
        raise ValueError(
            f"onnxruntime gives other codes ({wrong:.2%}) or pictures (largest difference {off:.3g}); nothing was exported"
        )
