"""The adversarial part of the tokenizer's training.

- PatchGAN (arXiv:1611.07004): judges overlapping patches; with GroupNorm in place of BatchNorm, whose statistics of real
  and reconstructed batches disturb each other and break under several processes
- hinge loss (arXiv:1705.02894) with LeCAM regularisation (arXiv:2104.03310), whose anchors are buffers and so survive a
  resume
- the adaptive weight of VQGAN (arXiv:2012.09841) from one backward pass: the gradients of both losses are taken at the
  reconstruction, their norms at the last layer follow by one convolution each, and the sum is sent through the
  decoder once

Letters: B batch, C channels.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """Logits of patches: high for real ones.

    Args:
        layers: strided convolutions; the receptive field is 34 pixels for 2 (64x64 pictures) and 70 for 3 (256x256).
        width: channels of the first layer.
        lecam_decay: of the moving means of the logits.

    Buffers:
        real_mean, fake_mean: moving means of the logits of real pictures and of reconstructions.
    """

    def __init__(self, layers: int = 2, width: int = 32, lecam_decay: float = 0.99):
        super().__init__()
        self.lecam_decay = lecam_decay
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            inside, outside = width * min(2 ** (layer - 1), 8), width * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [
                nn.Conv2d(inside, outside, 4, stride, 1, bias=False),
                nn.GroupNorm(8, outside),
                nn.LeakyReLU(0.2),
            ]
        self.network = nn.Sequential(*parts, nn.Conv2d(outside, 1, 4, 1, 1))
        self.register_buffer("real_mean", torch.zeros(()))
        self.register_buffer("fake_mean", torch.zeros(()))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 1, h, w) logits of pictures (B, 3, H, W) in [-1, 1]."""
        return self.network(pixels)

    def loss(self, real: torch.Tensor, fake: torch.Tensor, lecam_weight: float) -> torch.Tensor:
        """Hinge loss and LeCAM of the logits of real pictures and of reconstructions; scalar."""
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        return hinge + lecam_weight * lecam

    @torch.no_grad()
    def remember(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Move the anchors of LeCAM; the same on all processes."""
        means = average(torch.stack([real.mean(), fake.mean()]))
        self.real_mean.lerp_(means[0], 1 - self.lecam_decay)
        self.fake_mean.lerp_(means[1], 1 - self.lecam_decay)


def average(values: torch.Tensor) -> torch.Tensor:
    """Mean over all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


@torch.no_grad()
def adaptive_weight(
    reconstruction_gradient: torch.Tensor,
    adversarial_gradient: torch.Tensor,
    features: torch.Tensor,
    kernel: torch.Tensor,
    largest: float = 10.0,
) -> torch.Tensor:
    """How much the adversarial gradient has to be scaled to weigh as much as the other at the last layer.

    Args:
        reconstruction_gradient, adversarial_gradient: (B, C, H, W), of either loss by the output of the last convolution.
        features: (B, C', H, W), the input of that convolution (3x3, padding 1).
        kernel: its weight.
        largest: upper bound; while the adversarial gradient is still tiny, the ratio would explode.

    Returns:
        scalar in [0, largest], fp32, the same on all processes.
    """
    norms = torch.stack(
        [
            torch.nn.grad.conv2d_weight(features.float(), kernel.shape, gradient.float(), padding=1).norm()
            for gradient in (reconstruction_gradient, adversarial_gradient)
        ]
    )
    first, second = average(norms)
    return (first / (second + 1e-6)).clamp(max=largest)
