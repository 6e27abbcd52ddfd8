"""Improves the decoder of a finished tokenizer: `unitok-hf train-tokenizer --vq_model_path DIR --decoder_only true`.

Encoder and codebook stand still, so that codes made before, and models trained on them, stay valid; only the pictures of
codes get better. The second stage of TiTok (arXiv:2406.07550), for any tokenizer folder. The finished folder is written
when its codes are proved to be those of the folder it came from.
"""

from collections.abc import Iterable

import torch

from ..modeling_unitok.modeling_vq import UniTokVQModel, nearest_codes
from .quantizers import Quantized, Quantizer, gather_rows


TUNED = ("decoder.", "post_quant_conv.")


def freeze_codes(vq: UniTokVQModel) -> None:
    """Leave only what comes after the codes to the optimizer."""
    for name, parameter in vq.named_parameters():
        parameter.requires_grad_(name.startswith(TUNED))


class FrozenCodebook(Quantizer):
    """A codebook that has learned: it is looked up, and counted for the log."""

    def __init__(self, num_codes: int, width: int):
        super().__init__(num_codes, width, buffer_rows=1)
        self.started.fill_(True)

    def _quantize(self, latents, codebook):
        codes = nearest_codes(latents, codebook)
        vectors = codebook[codes].detach()
        self.pending.append(codes)
        return Quantized(vectors, torch.nn.functional.mse_loss(latents, vectors), latents.new_zeros(()))

    def observe(self, latents):
        """Nothing is learned from latents."""

    @torch.no_grad()
    def step(self, codebook, step):
        codes = gather_rows(torch.cat(self.pending))
        self.pending.clear()
        self.tokens.fill_(len(codes))
        self.steps += 1
        self.window += torch.bincount(codes, minlength=len(codebook))
        return self.age.new_empty(0)


@torch.no_grad()
def require_same_codes(folder: str, source: str, batches: Iterable[torch.Tensor], device: torch.device) -> None:
    """Hold a written tokenizer against the one it came from.

    Args:
        folder, source: the two tokenizers.
        batches: pictures (B, 3, H, W) in [-1, 1].
        device: where to encode them.

    Raises:
        ValueError: a weight before the decoder is not the same bit for bit (named), or a picture has other codes.
    """
    ours, theirs = (UniTokVQModel.from_pretrained(path).to(device).eval() for path in (folder, source))
    weights = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if not name.startswith(TUNED) and not torch.equal(tensor, weights[name]):
            raise ValueError(
                f"{name} is not that of {source}; nothing was saved, its codes would have another meaning"
            )
    seen = 0
    for pixels in batches:
        pixels = pixels.to(device)
        differs = (ours.encode_to_indices(pixels) != theirs.encode_to_indices(pixels)).flatten(1).any(dim=1)
        if differs.any():
            raise ValueError(f"picture {seen + int(differs.nonzero()[0])} has other codes than {source} gives it")
        seen += len(pixels)
