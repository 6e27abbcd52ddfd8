"""A moving average of the tokenizer's weights, the one that is evaluated and released.

    averaged = decay · averaged + (1 - decay) · live,   decay = min(weight_ema_decay, (1 + t) / (10 + t))

where t counts the steps since the codebook was made; until then nothing is quantised and the average is a plain copy.

A codebook next to an averaged encoder must be averaged, too: the live one belongs to an encoder that has moved on. Its
rows are averaged as all weights are, but a revived code is a new one and enters the average as it is; then the table is
made again what the quantizer's mode says a table is (a mean of unit vectors is shorter than one).
"""

import copy

import torch
from torch import nn

from ..modeling_unitok.modeling_vq import UniTokVQModel
from .quantizers import Quantizer


class WeightAverage(nn.Module):
    """The averaged tokenizer, `vq`; every process makes the same.

    Args:
        live: the tokenizer in training.
        decay: of the average, per step, in the long run.

    Attributes:
        updates: steps averaged so far, t; part of the state dict.
    """

    def __init__(self, live: UniTokVQModel, decay: float):
        super().__init__()
        self.vq = copy.deepcopy(live).requires_grad_(False)
        self.decay, self.updates = decay, 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.updates = int(state)

    @torch.no_grad()
    def copy(self, live: UniTokVQModel) -> None:
        """Begin anew from the live weights."""
        torch._foreach_copy_(list(self.vq.parameters()), list(live.parameters()))
        self.updates = 0

    @torch.no_grad()
    def update(self, live: UniTokVQModel, quantizer: Quantizer, revived: torch.LongTensor) -> None:
        """Take in the weights after an optimizer step.

        Args:
            live: the tokenizer in training.
            quantizer: what made its codebook.
            revived: (n,) codes that are new in this step.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.vq.parameters()), list(live.parameters()), 1 - decay)
        self.updates += 1
        table = self.vq.codebook
        table[revived] = live.codebook[revived]
        if quantizer.norm == "l2" or quantizer.extra_columns:
            table[:, : quantizer.width] = quantizer.unit(table[:, : quantizer.width])
        if quantizer.extra_columns:
            quantizer.refresh(table)
