"""Cross entropy of a language-model head whose logits are never all in memory.

    hidden (N, D) ── slices of rows ── head ── logits of a slice ── cross entropy ── (N,)

- a slice holds at most SLICE logits; its own are computed again in the backward pass and then dropped
- N rows that fit in one slice are computed plainly: a small vocabulary pays nothing
- the head is called as a function, so a softcap, a bias, or an adapter in it needs no case here

The idea of Cut Cross-Entropy (arXiv:2411.09009) and of Liger's chunked loss, by checkpointing in place of a kernel:
`torch.nn.functional.linear_cross_entropy` takes a bare weight and knows no softcap, which NanoChat and Gemma have.

Letters: N labelled tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


SLICE = 2**24  # logits in memory at once: 64 MiB in fp32, 252 rows of a vocabulary of 66,560


def sliced_cross_entropy(
    hidden: torch.Tensor, targets: torch.LongTensor, head: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
) -> torch.Tensor:
    """Negative log-likelihoods (N,) in fp32 of the targets.

    Args:
        hidden: (N, D), of any floating dtype.
        targets: (N,) in [0, V).
        head: logits (n, V) of hidden states (n, D).
        vocab_size: V.
    """

    def losses(rows: torch.Tensor, row_targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(head(rows).float(), row_targets, reduction="none")

    rows = max(1, SLICE // vocab_size)
    if len(hidden) <= rows:
        return losses(hidden, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
