"""Small random changes of pictures: for data sets of a few thousand, which a model learns by heart within minutes.

- affine: rotation up to 10 degrees, shift up to 6 %, scale and shear up to 12 %; what moves in from outside repeats the border
- flip: every other picture mirrored; for tokenizers, not for captions that tell left from right
"""

import math

import torch
import torch.nn.functional as F


def random_affine(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A turned, shifted, scaled and sheared copy of one picture (3, H, W)."""
    turn, shift_x, shift_y, scale, shear = (2 * torch.rand(5, generator=generator) - 1).tolist()
    angle, scale, shear = math.radians(10 * turn), 1 + 0.12 * scale, 0.12 * shear
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    # grid_sample's coordinates span 2, so a shift of 6 % of the side is 0.12
    matrix = torch.tensor([[[cos, shear - sin, 0.12 * shift_x], [sin, cos, 0.12 * shift_y]]])
    grid = F.affine_grid(matrix, [1, *pixels.shape], align_corners=False)
    return F.grid_sample(pixels[None], grid, padding_mode="border", align_corners=False)[0]


def unchanged(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The picture itself."""
    return pixels


def random_flip(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One picture (3, H, W), or as often its mirror image."""
    return pixels.flip(-1) if torch.rand((), generator=generator) < 0.5 else pixels


AUGMENTATIONS = {"none": unchanged, "affine": random_affine, "flip": random_flip}
