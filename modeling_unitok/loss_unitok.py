"""Cross entropy of a language-model head whose logits are never all in memory.

    hidden (N, D) ── slices of rows ── head ── logits of a slice ── cross entropy and its gradients ── sums

- a slice holds at most SLICE logits. Its gradients, towards its hidden states and the head, are taken at once, in the
  forward pass, and its logits are dropped: nothing is computed twice, and the backward pass only scales
- N rows that fit in one slice are computed plainly: a small vocabulary pays nothing
- the head is called as a function, so a softcap, a bias, or an adapter in it needs no case here

The idea of Cut Cross-Entropy (arXiv:2411.09009) and of Liger's fused loss, by autograd in place of a kernel:
`torch.nn.functional.linear_cross_entropy` takes a bare weight and knows no softcap, which NanoChat and Gemma have.

Letters: N labelled tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn


SLICE = 2**25  # logits in memory at once: 128 MiB in fp32, 504 rows of a vocabulary of 66,560

Head = Callable[[torch.Tensor], torch.Tensor]


def sliced_cross_entropy(
    hidden: torch.Tensor,
    targets: torch.LongTensor,
    weights: torch.Tensor,
    head: Head,
    parameters: Iterable[nn.Parameter],
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of negative log-likelihoods.

    Args:
        hidden: (N, D), of any floating dtype.
        targets: (N,) in [0, V).
        weights: (N,) of the tokens, without gradient.
        head: logits (n, V) of hidden states (n, D).
        parameters: of the head; those that are trained get their gradients.
        vocab_size: V.

    Returns:
        the sum, a scalar in fp32, and the likelihoods (N,) in fp32 without gradient.
    """
    rows = max(1, SLICE // vocab_size)
    if len(hidden) <= rows or not torch.is_grad_enabled():
        nll = [_nll(head, *part) for part in zip(hidden.split(rows), targets.split(rows), strict=True)]
        nll = torch.cat(nll) if nll else hidden.new_zeros(0, dtype=torch.float32)
        return (weights * nll).sum(), nll.detach()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return _SlicedCrossEntropy.apply(head, targets, weights, rows, hidden, *trained)


def _nll(head: Head, hidden: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


class _SlicedCrossEntropy(torch.autograd.Function):
    """`sliced_cross_entropy` of many rows; can be differentiated once."""

    @staticmethod
    def forward(ctx, head: Head, targets, weights, rows: int, hidden: torch.Tensor, *trained: nn.Parameter):
        towards_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter) for parameter in trained]
        parts, loss = [], weights.new_zeros((), dtype=torch.float32)
        slices = (tensor.split(rows) for tensor in (hidden, targets, weights, towards_hidden))
        for states, wanted, weight, towards in zip(*slices, strict=True):
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                nll = _nll(head, states, wanted)
                part = (weight * nll).sum()
                gradient, *gradients = torch.autograd.grad(part, [states, *trained], allow_unused=True)
            towards.copy_(gradient)
            for total, found in zip(sums, gradients, strict=True):
                if found is not None:
                    total += found
            parts.append(nll.detach())
            loss += part.detach()
        ctx.save_for_backward(towards_hidden, *sums)
        nll = torch.cat(parts)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, scale: torch.Tensor, _):
        return None, None, None, None, *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)
