"""Published VQGAN checkpoints as tokenizers: what `UniTokVQModel.from_taming(path)` and its sisters do.

    file -> tensors alone -> the names of diffusers.VQModel -> folds -> architecture from the shapes -> UniTokVQModel

| method         | takes                                                | pictures | what changes besides names       |
|----------------|------------------------------------------------------|----------|----------------------------------|
| from_taming    | VQGAN of taming-transformers, VQ of latent-diffusion | [-1, 1]  | nothing                          |
| from_llamagen  | LlamaGen VQ-16, VQ-8; of a training file the EMA     | [-1, 1]  | unit codes, latents of length ~1 |
| from_open_muse | open-muse VQGANModel                                 | [0, 1]   | nothing                          |
| from_open_muse | open-muse MaskGitVQGAN (1d-tokenizer has a copy)     | [0, 1]   | `fold_maskgit`                   |
| from_open_muse | the folder `vqvae` of aMUSEd, which is stock already | [0, 1]   | nothing                          |

- codes and pictures are those of the original, up to the rounding of sums in another order
- no configuration is read: widths, levels, attention and codebook are in the shapes. What is not is the same in all
  published files (groups of 32, one attention head), except the size of the training pictures, left to the caller
- nothing is unpickled: a file of more than tensors and plain containers is refused, with the command that takes the
  tensors out without running a line of the file
- tensors of losses and statistics are left out, which the log tells; any other that finds no place is an error, as is
  any place that finds no tensor
- where the original sees pictures in [0, 1], `pixel_range` is (0, 1): pictures are in [-1, 1] here as everywhere, and
  stock diffusers, given the saved folder, takes and returns what the original does

Refused, by the names of their tensors: Gumbel quantizers, remapped codes, and the MOVQ, Paella and LFQ of open-muse.
"""

import json
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file


logger = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]
Names = tuple[tuple[str, str], ...]  # patterns and replacements

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("ema", "model", "state_dict")  # where training files keep the weights; the first that is there
IGNORED = re.compile(r"(loss|discriminator)\.|quantize\.codebook_used$")
CODEBOOK = "quantize.embedding.weight"

NAMES = (
    (r"^encoder\.(down|conv_blocks)\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),  # deepest first, as in diffusers; `decoder.up` is not
    (r"\.(block|res)\.(\d+)\.", r".resnets.\2."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.(upsample\.conv|upsample_conv)\.", ".upsamplers.0.conv."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)
TAMING_MIDDLE = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
)
LLAMAGEN_MIDDLE = (
    (r"\.mid\.0\.", ".mid_block.resnets.0."),
    (r"\.mid\.1\.", ".mid_block.attentions.0."),
    (r"\.mid\.2\.", ".mid_block.resnets.1."),
)
MASKGIT_MIDDLE = ((r"\.mid\.(\d+)\.", r".mid_block.resnets.\1."),)


def convert_taming(model_class: type, path: str, sample_size: int):
    """A tokenizer of class `model_class`, in evaluation mode, from a checkpoint of taming-transformers.

    Args:
        model_class: UniTokVQModel or a subclass.
        path: a file, or a folder with one file of weights (several: the safetensors file).
        sample_size: side of the training pictures in pixels.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: the file is damaged, holds pickled objects, or is of another layout: what is wrong is named.
    """
    return build(model_class, path, read_weights(path), TAMING_MIDDLE, sample_size=sample_size)


def convert_llamagen(model_class: type, path: str, sample_size: int):
    """As `convert_taming`, for LlamaGen, which chooses the code nearest in angle.

    For codes of unit length that is the nearest in distance: ||z - e||² = ||z||² + 1 - 2 z·e. The length of z is then
    free, and is brought near 1, where distances are sharp in fp32 (of latents of length 10,000, stock diffusers gives
    1 in 70 another code). The factor is a power of two, which leaves every digit as it was.
    """

    def unit_codes(weights: Weights) -> Weights:
        return weights | {CODEBOOK: F.normalize(weights[CODEBOOK], dim=1)}

    model = build(model_class, path, read_weights(path), LLAMAGEN_MIDDLE, unit_codes, sample_size=sample_size)
    with torch.no_grad():
        probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
        length = model.encode(probe).latents.norm(dim=1).mean().item()
        for parameter in model.quant_conv.parameters():
            parameter *= 2.0 ** -round(math.log2(length))
    return model


def convert_open_muse(model_class: type, path: str, sample_size: int):
    """As `convert_taming`, for the two VQGANs of open-muse, and for aMUSEd's, a folder of diffusers."""
    settings = {"sample_size": sample_size, "pixel_range": (0.0, 1.0)}
    config = Path(path) / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("_class_name") == "VQModel":
        return model_class.from_pretrained(path, **settings).eval()
    weights = read_weights(path)
    if "encoder.mid.0.conv1.weight" in weights:
        return build(model_class, path, weights, MASKGIT_MIDDLE, fold_maskgit, **settings)
    return build(model_class, path, weights, TAMING_MIDDLE, **settings)


def read_weights(path: str) -> Weights:
    """The tensors of a checkpoint by name, in fp32, but those of losses and statistics; raises as `convert_taming`."""
    file = Path(path)
    if file.is_dir():
        found = [entry for suffix in SUFFIXES for entry in sorted(file.glob(f"*{suffix}"))]
        if not found:
            raise FileNotFoundError(f"{file} holds no file of weights ({', '.join(SUFFIXES)})")
        if len(found) > 1 and found[1].suffix == found[0].suffix:
            raise ValueError(f"{file} holds several files of weights, {found[0].name} and {found[1].name}; name one")
        file = found[0]
    content = load_tensors(file)
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{file} holds no weights: neither tensors by name, nor any under {', '.join(WRAPPERS)}")
    ignored = {name for name in content if IGNORED.match(name)}
    if ignored:
        groups = sorted({".".join(name.split(".")[:2]) for name in ignored})
        logger.info("%s: left out %d tensors of %s", file, len(ignored), ", ".join(groups))
    return {name: tensor.float() for name, tensor in content.items() if name not in ignored}


def load_tensors(file: Path) -> object:
    """What a file of tensors and plain containers holds; nothing in it is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file) if zipfile.is_zipfile(file) else []
        if not unsafe:
            raise ValueError(
                f"{file} is damaged, or pickled as before torch 1.6; get it again, or save it anew"
            ) from error
        plain = str(file.with_suffix(".weights.pt"))
        raise ValueError(
            f"{file} holds pickled objects besides tensors ({', '.join(sorted(unsafe))}), which are not loaded: that "
            f"could run any code. This writes the tensors alone to {plain}, with a dummy for each object:\n"
            'python -c "import torch; s = torch.serialization; '
            "dummy = type('Dummy', (), {'__init__': lambda *_: None}); "
            f"s.add_safe_globals([(dummy, name) for name in s.get_unsafe_globals_in_checkpoint({str(file)!r})]); "
            f"content = torch.load({str(file)!r}, map_location='cpu', weights_only=True); "
            f'torch.save({{k: content[k] for k in {WRAPPERS} if k in content}}, {plain!r})"'
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or no file of weights: {error}") from error


def build(
    model_class: type,
    path: str,
    original: Weights,
    middle: Names,
    fold: Callable[[Weights], Weights] = dict,
    **settings,
):
    """The model of the renamed and folded weights.

    Args:
        model_class, path: as `convert_taming`; `path` is for messages.
        original: weights by the names of the original.
        middle: the layout's names for the blocks between the levels and the latents, by which layouts tell apart.
        fold: gives weights of another arithmetic those of stock's, both by the names of diffusers.
        settings: arguments of the model that shapes do not tell.
    """
    if any(".mid_block." in name for name in original):
        raise ValueError(f"{path} has the names of a diffusers VQModel; load its folder with from_pretrained")
    deepest = count(original, "decoder.up.") - 1
    names = {name: stock_name(name, middle, deepest) for name in original}
    try:
        weights = fold({names[name]: as_stock(names[name], tensor) for name, tensor in original.items()})
        with torch.device("meta"):
            model = model_class(**architecture(weights), **settings)
    except KeyError as missing:
        raise ValueError(
            f"{path} is of another layout: it lacks {missing} (as diffusers names it); it has {first(original)}"
        ) from missing
    expected = model.state_dict()
    unknown = [name for name in original if names[name] not in expected]
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} tensors that the architecture does not: {first(unknown)}")
    absent = [name for name in expected if name not in weights]
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} tensors (as diffusers names them): {first(absent)}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path} has {name} (as diffusers names it) of shape {tuple(tensor.shape)}, "
                f"where the other tensors call for {tuple(expected[name].shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path} has values in {name} (as diffusers names it) that are not finite")
    model.load_state_dict(weights, assign=True)
    return model.eval()


def first(names: Iterable[str]) -> str:
    """The first three, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def stock_name(name: str, middle: Names, deepest: int) -> str:
    """The name of a tensor in diffusers, which counts decoder levels from the `deepest`, where `decoder.up` ends."""
    for pattern, replacement in (*middle, *NAMES):
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up_blocks.{deepest - int(level[1])}", name)


def as_stock(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The 1x1 convolutions of attention as the linear layers that they are in diffusers."""
    return tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


def architecture(weights: Weights) -> dict:
    """The arguments of UniTokVQModel that shapes tell, from the names of diffusers; KeyError names what is missing."""
    levels = max(1, count(weights, "encoder.down_blocks."))  # without any, the first is what is missing
    attention = "attentions.0.to_q.weight"
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "patch_size": 1,
        "block_out_channels": tuple(
            weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0] for level in range(levels)
        ),
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if f"encoder.down_blocks.{level}.{attention}" in weights else "DownEncoderBlock2D"
            for level in range(levels)
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if f"decoder.up_blocks.{level}.{attention}" in weights else "UpDecoderBlock2D"
            for level in range(levels)
        ),
        "layers_per_block": count(weights, "encoder.down_blocks.0.resnets."),
        "mid_block_add_attention": f"encoder.mid_block.{attention}" in weights,
        "num_vq_embeddings": weights[CODEBOOK].shape[0],
        "vq_embed_dim": weights[CODEBOOK].shape[1],
        "latent_channels": weights["quant_conv.weight"].shape[1],
    }


def count(weights: Weights, prefix: str) -> int:
    """How many numbered modules there are under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def fold_maskgit(weights: Weights) -> Weights:
    """MaskGIT's arithmetic as stock's, exactly.

    - Halving is the mean of 2x2: a 3x3 convolution of stride 2 with 1/4 in its upper left 2x2 and 0 elsewhere.
    - Where a block changes the width, MaskGIT adds to its result a 1x1 convolution N of that result, not of the
      block's input as others do: (1 + N) goes into the second convolution, and the shortcut of the input becomes 0.
    - A decoder level has one block less than stock's: a block that adds 0 follows. Its first convolution passes its
      input on, so that the second still learns when the decoder is trained on.
    - The last convolution of the encoder is 1x1: the centre of a 3x3. No convolution stands on either side of the
      codebook: the identity does. A missing bias is 0.
    """
    folded = dict(weights)

    def convolution(name: str, weight: torch.Tensor) -> None:
        folded[f"{name}.weight"] = weight
        folded[f"{name}.bias"] = torch.zeros(weight.shape[0])

    for name, weight in weights.items():
        if name == "encoder.conv_in.weight" or re.search(r"\.resnets\.\d+\.conv[12]\.weight$", name):
            convolution(name.removesuffix(".weight"), weight)
    for name in weights:
        if name.endswith(".conv_shortcut.weight"):
            block = name.removesuffix(".conv_shortcut.weight")
            inner, outer = weights[f"{block}.conv2.weight"], weights[name][:, :, 0, 0]
            convolution(f"{block}.conv2", inner + torch.einsum("om,mihw->oihw", outer, inner))
            convolution(f"{block}.conv_shortcut", torch.zeros_like(weights[f"{block}.conv1.weight"][:, :, :1, :1]))
    levels = count(weights, "encoder.down_blocks.")
    for level in range(levels - 1):
        width = weights[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"].shape[0]
        mean = torch.zeros(width, width, 3, 3)
        mean[range(width), range(width), :2, :2] = 0.25
        convolution(f"encoder.down_blocks.{level}.downsamplers.0.conv", mean)
    for level in range(levels):
        blocks = f"decoder.up_blocks.{level}.resnets."
        width = weights[f"{blocks}0.conv1.weight"].shape[0]
        idle = f"{blocks}{count(weights, blocks)}"
        for norm in ("norm1", "norm2"):
            folded[f"{idle}.{norm}.weight"], folded[f"{idle}.{norm}.bias"] = torch.ones(width), torch.zeros(width)
        convolution(f"{idle}.conv1", torch.nn.init.dirac_(torch.empty(width, width, 3, 3)))
        convolution(f"{idle}.conv2", torch.zeros(width, width, 3, 3))
    folded["encoder.conv_out.weight"] = F.pad(weights["encoder.conv_out.weight"], (1, 1, 1, 1))
    identity = torch.eye(weights[CODEBOOK].shape[1])[:, :, None, None]
    convolution("quant_conv", identity)
    convolution("post_quant_conv", identity.clone())
    return folded
