"""Muon for the matrices of the layers, another optimizer for the rest, as one optimizer.

    matrices    the weights of linear layers and convolutions inside   torch.optim.Muon
    the rest    what comes first and last, norms, biases               AdamW, or whatever `--optim` names

The kernel of a convolution (out, in, h, w) is a matrix (out, in · h · w).

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a matrix; nanochat
trains this way. Its steps are scaled to the size of AdamW's (arXiv:2502.16982), so that one learning rate and one weight
decay serve both; nanochat has a rate of its own for each kind instead. A single object with a single state, so that
schedules, checkpoints and gradient clipping see nothing unusual.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D


def layer_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trained 2-dimensional weights of linear layers but the head, each once."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outside = {id(end.weight) for end in ends if end is not None}
    linear = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    inside = {id(weight): weight for weight in linear if weight.requires_grad and id(weight) not in outside}
    return list(inside.values())


def kernels(coder: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions inside an encoder or decoder, without its first and last one."""
    layers = [module for module in coder.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [layer.weight for layer in layers if layer not in (coder.conv_in, coder.conv_out)]


def decay_groups(trainer: Trainer, apart: list[nn.Parameter]) -> list[dict]:
    """What a trainer trains and is not among `apart`, as two groups of an optimizer: with weight decay, and without."""
    outside = {id(parameter) for parameter in apart}
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in outside:
            groups[name in decayed].append(parameter)
    return [
        {"params": groups[True], "weight_decay": trainer.args.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


class MuonWith(torch.optim.Optimizer):
    """Muon on the matrices, another optimizer on the rest.

    Args:
        matrices: parameters of linear layers and convolutions.
        rest: parameter groups of the other optimizer.
        lr, weight_decay: of Muon.
        other: makes the other optimizer of `rest`.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        rest: list[dict],
        lr: float,
        weight_decay: float,
        other: Callable[[list[dict]], torch.optim.Optimizer],
    ):
        self.views = {weight: nn.Parameter(weight.detach().flatten(1)) for weight in matrices if weight.ndim > 2}
        self.muon = torch.optim.Muon(
            [self.views.get(weight, weight) for weight in matrices],
            lr=lr,
            weight_decay=weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        self.other = other(rest)
        super().__init__([*self.muon.param_groups, *self.other.param_groups], {})

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """One step of both, which work on the groups and the state of this object."""
        loss = None if closure is None else closure()
        for weight, matrix in self.views.items():
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part, groups in ((self.muon, self.param_groups[:1]), (self.other, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state
            part.step()
        for matrix in self.views.values():
            matrix.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every optimizer, also for the kernels that Muon sees as matrices."""
        for weight in self.views:
            weight.grad = None
        super().zero_grad(set_to_none)
