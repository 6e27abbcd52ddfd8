"""Reconstruction losses of the image tokenizer.

- l1: L1 between the picture and its reconstruction, plus L1 between both after 2x2 and 4x4 average pooling: the pooled
  terms weigh colours and shapes against the pixel noise that few tokens cannot hold anyway
- l2: the squared error, which is what PSNR measures; where it is large it has the larger gradient, and a short training
  gets further with it
- l1_l2: the squared error and the absolute one: the first for PSNR, the second for flat colours, which the squared error
  leaves noisy, as it hardly has a gradient where little is missing
"""

import torch
import torch.nn.functional as F


def multi_scale_l1(reconstruction: torch.Tensor, pixels: torch.Tensor, pooled_weight: float = 0.5) -> torch.Tensor:
    """Mean absolute error at full, half and quarter resolution.

    Args:
        reconstruction, pixels: (B, 3, H, W) in [-1, 1].
        pooled_weight: weight of each pooled term next to the full-resolution one.

    Returns:
        scalar.
    """
    error = reconstruction - pixels
    loss = error.abs().mean()
    for size in (2, 4):
        loss = loss + pooled_weight * F.avg_pool2d(error, size).abs().mean()
    return loss


def squared_error(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Four times the mean squared error of pictures (B, 3, H, W) in [-1, 1], scalar: early in training as large as
    `multi_scale_l1`, so that the weights of the other losses mean the same with both."""
    return 4 * F.mse_loss(reconstruction, pixels)


def both_errors(reconstruction: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """`squared_error` and the mean absolute error of pictures (B, 3, H, W) in [-1, 1], scalar."""
    return squared_error(reconstruction, pixels) + F.l1_loss(reconstruction, pixels)


RECONSTRUCTION_LOSSES = {"l1": multi_scale_l1, "l2": squared_error, "l1_l2": both_errors}
