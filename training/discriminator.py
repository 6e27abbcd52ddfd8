"""The adversarial part of the tokenizer's training.

- PatchGAN (arXiv:1611.07004): judges overlapping patches; with GroupNorm in place of BatchNorm, whose statistics of real
  and reconstructed batches disturb each other and break under several processes
- hinge loss (arXiv:1705.02894) with LeCAM regularisation (arXiv:2104.03310), whose anchors are buffers and so survive a
  resume
- the adaptive weight of VQGAN (arXiv:2012.09841) from one backward pass: the gradients of both losses are taken at the
  reconstruction, those at the last layer follow by one convolution each, and the sum is sent through the decoder once

Anchors and weight are statistics of a whole step: what its micro-batches and processes saw is put together when it ends,
and the next step uses it. So a step is the same in one piece or in many. (VQGAN weighs every micro-batch of every process
by itself; here the weight is one step old instead.)

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
        self.pending: list[torch.Tensor] = []  # mean logits of the micro-batches of this step

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 1, h, w) logits of pictures (B, 3, H, W) in [-1, 1]; fp32, also under autocast."""
        return self.network(pixels).float()

    def loss(self, real: torch.Tensor, fake: torch.Tensor, lecam_weight: float) -> torch.Tensor:
        """Hinge loss and LeCAM of the logits of real pictures and of reconstructions; scalar."""
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = F.relu(real - self.fake_mean).square().mean() + F.relu(self.real_mean - fake).square().mean()
        return hinge + lecam_weight * lecam

    def observe(self, real: torch.Tensor, fake: torch.Tensor) -> None:
        """Keep the mean logits of one micro-batch for the next `step`."""
        self.pending.append(torch.stack([real.detach().mean(), fake.detach().mean()]))

    @torch.no_grad()
    def step(self) -> None:
        """Move the anchors of LeCAM, after an optimizer step; the same on all processes."""
        if self.pending:
            means = average(torch.stack(self.pending).mean(dim=0))
            self.pending.clear()
            self.real_mean.lerp_(means[0], 1 - self.lecam_decay)
            self.fake_mean.lerp_(means[1], 1 - self.lecam_decay)


def average(values: torch.Tensor) -> torch.Tensor:
    """Mean over all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


class AdaptiveWeight(nn.Module):
    """How much the adversarial gradient has to be scaled to weigh as much as the other at the last layer.

    Args:
        largest: upper bound; while the adversarial gradient is still tiny, the ratio would explode.

    Buffers:
        value: () in [0, largest], fp32, the same on all processes; 0 until a step was measured.
    """

    def __init__(self, largest: float = 10.0):
        super().__init__()
        self.largest = largest
        self.register_buffer("value", torch.zeros(()))
        self.pending: list[torch.Tensor] = []  # gradients of the micro-batches of this step

    @torch.no_grad()
    def observe(
        self,
        reconstruction_gradient: torch.Tensor,
        adversarial_gradient: torch.Tensor,
        features: torch.Tensor,
        kernel: torch.Tensor,
    ) -> None:
        """Keep what one micro-batch says of the last layer for the next `step`.

        Args:
            reconstruction_gradient, adversarial_gradient: (B, C, H, W), of either loss by the output of the last
                convolution.
            features: (B, C', H, W), the input of that convolution (3x3, padding 1).
            kernel: its weight.
        """
        with torch.autocast(features.device.type, enabled=False):
            self.pending.append(
                torch.stack(
                    [
                        torch.nn.grad.conv2d_weight(features.float(), kernel.shape, gradient.float(), padding=1)
                        for gradient in (reconstruction_gradient, adversarial_gradient)
                    ]
                )
            )

    @torch.no_grad()
    def step(self) -> None:
        """Make the weight of the next step, from the gradients of the whole batch of this one."""
        if self.pending:
            gradients = average(torch.stack(self.pending).mean(dim=0))
            self.pending.clear()
            first, second = gradients.flatten(1).norm(dim=1)
            self.value.copy_((first / (second + 1e-6)).clamp(max=self.largest))
