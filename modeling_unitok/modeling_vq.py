"""UniTokVQModel: pictures to codes and back.

    pixels (B, 3, H, W) --unshuffle--> (B, 3p², H/p, W/p) --encoder--> latents (B, d, h, w)
    latents --nearest code--> codes (B, h, w) --embedding--> (B, d, h, w) --decoder, shuffle--> pixels

- a VQGAN (arXiv:2012.09841) in the layout of `diffusers.VQModel`: same constructor arguments, same submodules, same
  keys in the checkpoint; a saved folder loads in stock diffusers and gives the same codes
- `patch_size` p moves p x p pixels into channels before the first convolution (pixel unshuffle), because on small
  machines the full-resolution convolutions eat the time. The network inside stays stock: with p > 1, stock `VQModel`
  takes `pixel_unshuffle(pixels, p)` and returns a picture for `pixel_shuffle(sample, p)`; with p = 1, plain pixels
- `pixel_range` is where a network trained elsewhere sees black and white; pictures are in [-1, 1] here all the same
- adds what diffusers lacks: codes of a picture, a picture from codes, statistics of the codebook
- one nearest-neighbour lookup, `nearest_codes`, for training, encoding and evaluation: fp32, chunked, no (N, K) matrix
- slicing and tiling, under diffusers' names: one picture of a batch at a time, a large picture tile by tile

Letters: B batch, H W picture, h w grid, K codes, d code width, N latent vectors, p patch size.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, VectorQuantizer
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import nn

from ..configuration.refusal_unitok import refused_in_words, require_size
from .tiling_vq import blend_weights, owned_spans, tile_starts


LOOKUP_BYTES = 64 * 2**20  # the (rows, K) block of scores that the lookup holds at a time
MOST_LEVELS, MOST_LAYERS = 16, 256  # a file of a hundred bytes can ask for 10⁹
MOST_CHANNELS, MOST_PIXELS, MOST_CODES = 2**16, 2**16, 2**24
CPU_LOOKUP_BYTES = 4 * 2**20  # on a CPU: a block that stays in the cache is read back faster


@torch.no_grad()
def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    """Index of the Euclidean nearest codebook row of each latent vector.

    argmin ||z - e||² = argmax z·e - ||e||²/2, so ||z||² is never needed. Both sides are shifted by the mean code first:
    distances do not change, but fp32 loses fewer digits when the codes lie far from the origin.

    Args:
        latents: (N, d), any floating dtype; computed in fp32, with TF32 and autocast off: a rounded score picks another
            code, and codes are what everything downstream is trained on.
        codebook: (K, d).

    Returns:
        (N,) int64 in [0, K).
    """
    with torch.autocast(latents.device.type, enabled=False), full_fp32(latents.device):
        codebook = codebook.detach().float()
        centre = codebook.mean(dim=0)
        codebook = codebook - centre
        bias = -0.5 * codebook.square().sum(dim=1)  # (K,)
        size = CPU_LOOKUP_BYTES if latents.device.type == "cpu" else LOOKUP_BYTES
        rows = max(1, size // (4 * codebook.shape[0]))
        scores = codebook.new_empty(min(rows, latents.shape[0]), codebook.shape[0])
        codes = torch.empty(latents.shape[0], dtype=torch.int64, device=latents.device)
        for z, found in zip(latents.detach().split(rows), codes.split(rows), strict=True):
            torch.addmm(bias, z.float() - centre, codebook.T, out=scores[: len(z)])
            torch.argmax(scores[: len(z)], dim=1, out=found)
    return codes


def usage_and_perplexity(counts: torch.Tensor) -> dict[str, float]:
    """How well codes that were chosen so often (K,) use their codebook; see `UniTokVQModel.codebook_stats`."""
    counts = counts.cpu().double()  # not every device has float64
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


def require_finite(model: nn.Module, consequence: str) -> None:
    """Raises ValueError, with the name of the tensor, unless every weight is a finite number; one on the disk is not read."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{consequence}: {name} is not finite")


def require_safetensors(files: Iterable[str | os.PathLike]) -> None:
    """Raises ValueError if one of these files of weights is something else, which is not opened."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(
                f"{file} is listed as a part of the weights, but is no safetensors file; it is not opened"
            )


def is_range(bounds: object) -> bool:
    """Whether these are two finite numbers, the lower one first."""
    if not isinstance(bounds, list | tuple) or not all(type(bound) in (int, float) for bound in bounds):
        return False
    return len(bounds) == 2 and -math.inf < bounds[0] < bounds[1] < math.inf


class full_fp32:
    """Full fp32 matrix products on CUDA inside this block, whatever the training run has chosen."""

    def __init__(self, device: torch.device):
        self.active = device.type == "cuda"

    def __enter__(self):
        if self.active:
            self.before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    def __exit__(self, *_):
        if self.active:
            torch.backends.cuda.matmul.fp32_precision = self.before


class CodebookQuantizer(VectorQuantizer):
    """The stock quantizer (key `embedding.weight`) over `nearest_codes`, with the commitment weight on the right term.

    Stock `VectorQuantizer` builds the whole (N, K) distance matrix and, through its `legacy` default, puts beta on the
    codebook term instead of the commitment term (diffusers issue 8226).
    """

    def __init__(self, num_codes: int, width: int):
        super().__init__(num_codes, width, beta=0.25, legacy=False)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[None, None, torch.LongTensor]]:
        """Quantise latents (B, d, h, w); returns them with a straight-through gradient, the loss, and flat codes."""
        rows = z.permute(0, 2, 3, 1).float()  # (B, h, w, d)
        codes = nearest_codes(rows.flatten(0, 2), self.embedding.weight)  # (B·h·w,)
        chosen = self.embedding(codes).view(rows.shape).float()
        loss = self.beta * F.mse_loss(rows, chosen.detach()) + F.mse_loss(chosen, rows.detach())
        quantized = (rows + (chosen - rows).detach()).permute(0, 3, 1, 2).to(z.dtype)
        return quantized.contiguous(), loss, (None, None, codes)


class UniTokVQModel(VQModel):
    """Image tokenizer in the layout of `diffusers.VQModel`.

    The defaults make the tokenizer of the guide: 64x64 pictures, downsampling 16, a 4x4 grid of 1,024 codes.

    Args:
        in_channels, out_channels: channels of the inner network, 3 · patch_size² both.
        down_block_types, up_block_types: one per entry of `block_out_channels`; plain convolutional blocks by default.
        block_out_channels: widths; each level but the last halves the resolution.
        latent_channels, vq_embed_dim: width of a code; keep them equal, as aMUSEd's pipelines assume.
        sample_size: side of the training pictures in pixels.
        num_vq_embeddings: size K of the codebook.
        patch_size: pixels per side that become channels; derived from `in_channels` when not given.
        pixel_range: black and white as the inner network sees them, (0, 1) for aMUSEd. It cannot be folded into the
            first convolution, which pads pictures with zeros: grey in one range, black in the other.

    The other arguments are those of `diffusers.VQModel`.

    Raises:
        ValueError: channels, patch size and block lists do not fit together, or black is not below white; or a size is no
            whole number, or larger than that of any tokenizer (MOST_LAYERS and its like).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "CodebookQuantizer"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 48,
        out_channels: int = 48,
        down_block_types: tuple[str, ...] | None = None,
        up_block_types: tuple[str, ...] | None = None,
        block_out_channels: tuple[int, ...] = (64, 128, 128),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 16,
        sample_size: int = 64,
        num_vq_embeddings: int = 1024,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
        patch_size: int | None = None,
        pixel_range: tuple[float, float] = (-1.0, 1.0),
    ):
        if not isinstance(block_out_channels, list | tuple) or not 1 <= len(block_out_channels) <= MOST_LEVELS:
            raise ValueError(f"block_out_channels must be a list of 1 to {MOST_LEVELS}, got {block_out_channels!r}")
        for name, value, most in (
            *(("block_out_channels", width, MOST_CHANNELS) for width in block_out_channels),
            ("in_channels", in_channels, MOST_CHANNELS),
            ("layers_per_block", layers_per_block, MOST_LAYERS),
            ("latent_channels", latent_channels, MOST_CHANNELS),
            ("vq_embed_dim", vq_embed_dim or latent_channels, MOST_CHANNELS),
            ("num_vq_embeddings", num_vq_embeddings, MOST_CODES),
            ("norm_num_groups", norm_num_groups, MOST_CHANNELS),
            ("sample_size", sample_size, MOST_PIXELS),
        ):
            require_size(name, value, most)
        if norm_type not in ("group", "spatial"):
            raise ValueError(f"norm_type must be group or spatial, got {norm_type!r}")
        levels = len(block_out_channels)
        down_block_types = tuple(down_block_types or ["DownEncoderBlock2D"] * levels)
        up_block_types = tuple(up_block_types or ["UpDecoderBlock2D"] * levels)
        vq_embed_dim = vq_embed_dim or latent_channels
        patch_size = math.isqrt(in_channels // 3) if patch_size is None else patch_size
        if type(patch_size) is not int:
            raise ValueError(f"patch_size must be a whole number, got {patch_size!r}")
        if not len(down_block_types) == len(up_block_types) == levels:
            raise ValueError(
                f"{levels} block_out_channels need as many down_block_types and up_block_types, "
                f"got {len(down_block_types)} and {len(up_block_types)}"
            )
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
        if not in_channels == out_channels == 3 * patch_size**2:
            raise ValueError(
                f"patch_size {patch_size} needs in_channels = out_channels = {3 * patch_size**2}, "
                f"got {in_channels} and {out_channels}"
            )
        if not is_range(pixel_range):
            raise ValueError(f"pixel_range must be a lower and a higher number, got {pixel_range}")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        self.register_to_config(
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            vq_embed_dim=vq_embed_dim,
            patch_size=patch_size,
            pixel_range=tuple(pixel_range),
        )
        self.quantize = CodebookQuantizer(num_vq_embeddings, vq_embed_dim)
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "UniTokVQModel":
        """As diffusers does, from safetensors alone: a pickle beside them is never opened.

        The network takes memory for tensors that are in the file, whatever sizes the configuration claims.

        Raises:
            ValueError: the configuration or the weights are malformed, do not fit together, are not all there, or are not
                finite.
            OSError: there are none.
        """
        where = pretrained_model_name_or_path
        info = kwargs.pop("output_loading_info", False)
        lazily = kwargs.get("low_cpu_mem_usage", True) and kwargs.get("quantization_config") is None
        try:
            with (
                refused_in_words(f"the image tokenizer in {where} cannot be loaded"),
                torch.device("meta") if lazily else nullcontext(),
            ):
                model, found = super().from_pretrained(
                    where, **{"use_safetensors": True} | kwargs, output_loading_info=True
                )
        except OSError as error:
            cause = error
            while cause is not None and not isinstance(cause, SafetensorError):
                cause = cause.__context__
            if cause is None:
                raise
            raise ValueError(f"the weights in {where} are corrupt or were cut short: {cause}") from error
        except ValueError as error:
            if str(where) in str(error):
                raise
            raise ValueError(f"the image tokenizer in {where} cannot be loaded: {error}") from error
        missing = sorted(found["missing_keys"])
        if missing:
            raise ValueError(f"the weights in {where} lack {len(missing)} tensors, the first is {missing[0]}")
        require_finite(model, f"the weights in {where} are of no use")
        return (model, found) if info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, resolved_model_file, *args, **kwargs):
        require_safetensors(resolved_model_file)
        return super()._load_pretrained_model(model, state_dict, resolved_model_file, *args, **kwargs)

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers does; raises ValueError when a file does not hold keys and values."""
        found = super().load_config(*args, **kwargs)
        if not isinstance(found[0] if isinstance(found, tuple) else found, dict):
            raise ValueError(f"the configuration of {args[0] if args else cls.__name__} does not hold keys and values")
        return found

    @classmethod
    def from_taming(cls, path: str, sample_size: int = 256) -> "UniTokVQModel":
        """A VQGAN of taming-transformers; see `convert_vq` for what is accepted and what is raised.

        Args:
            path: a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file, or a folder with one.
            sample_size: side of the pictures in pixels, the one thing that tensors do not tell.
        """
        from .convert_vq import convert_taming

        return convert_taming(cls, path, sample_size)

    @classmethod
    def from_llamagen(cls, path: str, sample_size: int = 256) -> "UniTokVQModel":
        """LlamaGen's VQ-16 or VQ-8; arguments as `from_taming`."""
        from .convert_vq import convert_llamagen

        return convert_llamagen(cls, path, sample_size)

    @classmethod
    def from_open_muse(cls, path: str, sample_size: int = 256) -> "UniTokVQModel":
        """open-muse's VQGAN and MaskGIT-VQGAN, and aMUSEd's folder `vqvae`; arguments as `from_taming`."""
        from .convert_vq import convert_open_muse

        return convert_open_muse(cls, path, sample_size)

    @property
    def codebook(self) -> nn.Parameter:
        """The codes as vectors, (K, d)."""
        return self.quantize.embedding.weight

    @property
    def downsampling(self) -> int:
        """Pixels per side of one code."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of codes of a picture of this size in pixels.

        Raises:
            ValueError: a side is no multiple of the downsampling factor (stock diffusers would silently crop).
        """
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"a picture of {height}x{width} pixels does not divide into codes of "
                f"{self.downsampling}x{self.downsampling}; resize it to multiples of {self.downsampling}"
            )
        return height // self.downsampling, width // self.downsampling

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one by one: the memory of one picture, the same results."""
        super().enable_slicing()

    def enable_tiling(self) -> None:
        """Encode and decode pictures larger than `tile_sample_min_size` tile by tile: the memory of one tile.

        An approximation, and another function of the picture: see `tiling_vq`. Tiles have the size of the training
        pictures, unless `tile_sample_min_size` is set to another number of pixels, and share `tile_overlap_factor` of
        their side with each neighbour, a quarter unless set. Pictures made of codes fit best when they were encoded
        the same way.
        """
        super().enable_tiling()

    def _tile(self) -> tuple[int, int]:
        """Side of a tile and of what neighbours share, in codes.

        Raises:
            ValueError: the tile is no multiple of the downsampling factor, or tiles share more than a half.
        """
        if self.tile_sample_min_size < 1 or self.tile_sample_min_size % self.downsampling:
            raise ValueError(
                f"tile_sample_min_size must be a multiple of {self.downsampling}, got {self.tile_sample_min_size}"
            )
        if not 0 <= self.tile_overlap_factor <= 0.5:
            raise ValueError(f"tile_overlap_factor must lie in [0, 0.5], got {self.tile_overlap_factor}")
        side = self.tile_sample_min_size // self.downsampling
        return side, int(side * self.tile_overlap_factor)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[torch.Tensor]:
        """Continuous latents (B, d, h, w) of pictures (B, 3, H, W), before quantisation."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures must have shape (B, 3, H, W), got {tuple(x.shape)}")
        self.grid(*x.shape[-2:])
        latents = self._in_slices(self._encode_tiles if self.use_tiling else self._encode, x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def _in_slices(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([function(part) for part in batch.split(1)])
        return function(batch)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(self._to_network(pixels)))

    def _encode_tiles(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents of pictures from those of their tiles, each latent from the tile where it is farthest from the rim."""
        extents = self.grid(*pixels.shape[-2:])
        (side, shared), factor = self._tile(), self.downsampling
        starts = [tile_starts(extent, side, shared) for extent in extents]
        spans = [owned_spans(begin, side, extent) for begin, extent in zip(starts, extents, strict=True)]
        rows = []
        for top, (first, last) in zip(starts[0], spans[0], strict=True):
            row = []
            for left, (begin, end) in zip(starts[1], spans[1], strict=True):
                y, x = top * factor, left * factor
                window = pixels[..., y : y + side * factor, x : x + side * factor]
                row.append(self._encode(window)[..., first - top : last - top, begin - left : end - left])
            rows.append(torch.cat(row, dim=3))
        return torch.cat(rows, dim=2)

    @apply_forward_hook
    def decode(
        self, h: torch.Tensor, force_not_quantize: bool = False, return_dict: bool = True, shape=None
    ) -> DecoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, H, W) of latents (B, d, h, w), which are quantised first unless told otherwise."""
        if not force_not_quantize:
            h, commit_loss, _ = self.quantize(h)
        else:
            commit_loss = torch.zeros(h.shape[0], device=h.device, dtype=h.dtype)
            if self.config.lookup_from_codebook:
                h = self.quantize.get_codebook_entry(h, shape)
        sample = self._in_slices(self._decode_tiles if self.use_tiling else self._decode, h)
        return DecoderOutput(sample=sample, commit_loss=commit_loss) if return_dict else (sample, commit_loss)

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        spatial = quantized if self.config.norm_type == "spatial" else None
        return self._from_network(self.decoder(self.post_quant_conv(quantized), spatial))

    def _decode_tiles(self, quantized: torch.Tensor) -> torch.Tensor:
        """Pictures from those of tiles of latents, mixed linearly where tiles overlap."""
        extents = quantized.shape[-2:]
        (side, shared), factor = self._tile(), self.downsampling
        starts = [tile_starts(extent, side, shared) for extent in extents]
        if len(starts[0]) == len(starts[1]) == 1:
            return self._decode(quantized)
        weights = [
            blend_weights([start * factor for start in begin], side * factor, extent * factor).to(quantized)
            for begin, extent in zip(starts, extents, strict=True)
        ]
        sample = quantized.new_zeros(quantized.shape[0], 3, extents[0] * factor, extents[1] * factor)
        for top, down in zip(starts[0], weights[0], strict=True):
            for left, across in zip(starts[1], weights[1], strict=True):
                part = self._decode(quantized[..., top : top + side, left : left + side]) * (down[:, None] * across)
                y, x = top * factor, left * factor
                sample[..., y : y + part.shape[2], x : x + part.shape[3]] += part
        return sample

    def _to_network(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the first convolution takes, (B, 3p², H/p, W/p) in `pixel_range`."""
        low, high = self.config.pixel_range
        if (low, high) != (-1, 1):
            pixels = pixels * ((high - low) / 2) + (high + low) / 2
        return F.pixel_unshuffle(pixels, self.config.patch_size) if self.config.patch_size > 1 else pixels

    def _from_network(self, sample: torch.Tensor) -> torch.Tensor:
        """The inverse of `_to_network`."""
        low, high = self.config.pixel_range
        pixels = F.pixel_shuffle(sample, self.config.patch_size) if self.config.patch_size > 1 else sample
        return pixels if (low, high) == (-1, 1) else (pixels - (high + low) / 2) / ((high - low) / 2)

    @torch.no_grad()
    def encode_to_indices(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Codes of pictures.

        Autocast is off inside: encoded in half precision, some latents would get another code.

        Args:
            pixel_values: (B, 3, H, W), floating, in [-1, 1].

        Returns:
            (B, h, w) int64 in [0, K).

        Raises:
            ValueError: wrong shape or type, or values outside [-1, 1] (with the value seen).
        """
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel values must be floating, in [-1, 1], got {pixel_values.dtype}")
        low, high = torch.aminmax(pixel_values)
        if not (low >= -1.01 and high <= 1.01):
            raise ValueError(
                f"pixel values must lie in [-1, 1], got [{low.item():g}, {high.item():g}]; "
                "UniTokImageProcessor makes them so"
            )
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents = self.encode(pixel_values.to(self.dtype)).latents  # (B, d, h, w)
        batch, _, height, width = latents.shape
        rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
        return nearest_codes(rows, self.codebook).view(batch, height, width)

    def indices_to_latents(self, indices: torch.LongTensor) -> torch.Tensor:
        """Code vectors (B, d, h, w) of codes (B, h, w).

        Raises:
            ValueError: not integers, not three-dimensional, or a code outside [0, K), with its position.
        """
        if indices.ndim != 3 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"codes must be integers of shape (B, h, w), got {indices.dtype} {tuple(indices.shape)}")
        indices = indices.long()
        bad = (indices < 0) | (indices >= self.config.num_vq_embeddings)
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise ValueError(
                f"code {int(indices[tuple(where)])} at {where} is outside the codebook "
                f"[0, {self.config.num_vq_embeddings}); were these codes made by another tokenizer?"
            )
        return self.quantize.embedding(indices).permute(0, 3, 1, 2).contiguous()

    def decode_from_indices(self, indices: torch.LongTensor, return_dict: bool = True) -> DecoderOutput:
        """Pictures of codes.

        Args:
            indices: (B, h, w), or (B, h·w) row by row for square grids.

        Returns:
            `DecoderOutput` with `sample` (B, 3, H, W), meant to lie in [-1, 1] (the network does not clamp).

        Raises:
            ValueError: as `indices_to_latents`; or a flat row that is not a square grid.
        """
        if indices.ndim == 2:
            side = math.isqrt(indices.shape[1])
            if side * side != indices.shape[1]:
                raise ValueError(f"{indices.shape[1]} codes are no square grid; pass them as (B, h, w)")
            indices = indices.unflatten(1, (side, side))
        quantized = self.indices_to_latents(indices)
        sample = self._in_slices(self._decode_tiles if self.use_tiling else self._decode, quantized)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    get_code = encode_to_indices
    decode_code = decode_from_indices

    def codebook_stats(self, codes: torch.LongTensor) -> dict[str, float]:
        """How well a set of codes uses the codebook.

        Args:
            codes: any shape, the codes of as many pictures as possible: N codes can show at most N of K in use.

        Returns:
            `usage`, the fraction of codes that occur; `perplexity`, exp of the entropy of their distribution in nats,
            at most K.
        """
        return usage_and_perplexity(torch.bincount(codes.flatten(), minlength=self.config.num_vq_embeddings))

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As diffusers does, for checkpoints; `export` also proves that stock diffusers reads the folder right.

        Raises:
            ValueError: a weight is not finite (named); nothing was written.
        """
        for name, tensor in self.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite; nothing was saved. Was the learning rate too high?")
        super().save_pretrained(save_directory, *args, **kwargs)

    def export(
        self,
        folder: str | os.PathLike,
        pixel_values: torch.Tensor | None = None,
        lookup: Callable[[torch.Tensor], torch.LongTensor] | None = None,
    ) -> None:
        """Save for stock diffusers, and prove it: see `export_vq`.

        Args:
            folder: a new one, or an empty one. Nothing is left there when the proof fails.
            pixel_values: pictures (B, 3, H, W) in [-1, 1] to prove it on; noise when not given.
            lookup: what gives the right codes (N,) of latents (N, d) when the model was trained; `nearest_codes` in the
                codebook when not given.

        Raises:
            ExportError: a ValueError; the weights are not float32, or stock diffusers gives other codes to more than
                0.01 % of the latents, or a picture that differs by more than 1e-4, with what was measured.
            FileExistsError: the folder holds files.
            ValueError: as `save_pretrained`.
        """
        from .export_vq import export

        export(self, folder, pixel_values, lookup)

    def to_json_string(self) -> str:
        """The configuration as saved: under the stock class name, by which `diffusers.AutoModel` finds it."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = VQModel.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
