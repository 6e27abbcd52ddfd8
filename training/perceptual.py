"""How different two pictures look: LPIPS where its network can be had, EfficientNet-Lite0 in its place elsewhere.

- LPIPS (arXiv:1801.03924) over VGG-16, as torchmetrics keeps it: its linear heads come with torchmetrics, VGG with
  torchvision, from torch's cache or the network. Always in evaluation mode, so that its dropout never acts
- the stand-in has the form of LPIPS, with another network below and no weights learned from human judgements. Its values
  are no LPIPS and not comparable to it; in logs and results it has a name of its own

Letters: B batch.
"""

import logging
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from .efficientnet import EfficientNetLite0
from .pretrained import first_available


logger = logging.getLogger(__name__)


class LPIPS(nn.Module):
    """LPIPS with VGG-16; fp32, frozen.

    Raises:
        ImportError: torchvision is not installed.
        OSError: the weights are not in torch's cache, and cannot be downloaded.
    """

    name = "lpips"
    title = "LPIPS"

    def __init__(self):
        super().__init__()
        self.network = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """(B,) distances; gradients flow into `reconstruction` (B, 3, H, W) only, both are in [-1, 1]."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self.network(reconstruction.float(), pixels.detach().float()).flatten()


class EfficientNetDistance(nn.Module):
    """Squared distance of channel-normalised features of EfficientNet-Lite0, averaged over places and six stages."""

    name = "efficientnet_lite0_distance"
    title = "EfficientNet-Lite0 distance"

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0()

    def forward(self, reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """(B,) distances; gradients flow into `reconstruction` (B, 3, H, W) only, both are in [-1, 1]."""
        with torch.autocast(pixels.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.network.taps(pixels)
            found = self.network.taps(reconstruction)
            distances = [
                (F.normalize(a, dim=1, eps=1e-3) - F.normalize(b, dim=1, eps=1e-3))
                .square()
                .sum(dim=1)
                .mean(dim=(1, 2))
                for a, b in zip(found, wanted, strict=True)
            ]
        return torch.stack(distances).mean(dim=0)


DISTANCES = {"lpips": LPIPS, "efficientnet_lite0": EfficientNetDistance}


def perceptual_loss(network: Literal["auto", "lpips", "efficientnet_lite0"]) -> nn.Module | None:
    """The distance to train with: the one that is named, or with "auto" the first that can be had.

    Returns:
        None, with a warning, when "auto" finds none.

    Raises:
        ImportError, OSError: the one that is named cannot be had.
    """
    distance, reasons = first_available(DISTANCES.values() if network == "auto" else [DISTANCES[network]])
    if distance is None and network != "auto":
        raise ImportError("; ".join(reasons))
    if distance is None:
        logger.warning(
            f"training WITHOUT a perceptual loss, pictures will be blurred ({'; '.join(reasons)}). "
            "Install 'unitok-hf[perceptual]', or torchvision for LPIPS"
        )
    elif reasons:
        logger.warning(f"the perceptual loss is the {distance.title} ({'; '.join(reasons)})")
    return distance
