"""One step of the language model, as it is or compiled.

On a CPU, a small model spends half of a step between its operations: in modules, decorators and look-ups. Two ways out, both
through `torch.compile`, which checks that what it saw when it compiled still holds (adapters, types, shapes …):

- "trace": the operations in their order, run by TorchScript's interpreter. Ready in a second or two, needs no compiler,
  gives the very same numbers. For CPUs
- any other name is a backend of `torch.compile`: "inductor" also fuses operations, which takes a C++ compiler and up to a
  minute, and is what GPUs want

The mask, the cache and the position of a step are tensors of fixed shapes, so the step is compiled once per batch size and
length of the cache, which is rounded up to a multiple of `COLUMNS`.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache


COLUMNS = 32


def run(language_model: nn.Module, ids: torch.LongTensor, mask, position_ids: torch.LongTensor, cache: Cache):
    """Hidden states (R, D) after one more column of ids (R, 1).

    Args:
        mask: (R, 1, 1, T), added to the scores of attention; or (R, T), 1 where a column is seen.
        position_ids: (R, 1).
    """
    return language_model(
        input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]


def trace(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """A backend of `torch.compile`: the graph's operations, run by TorchScript's interpreter."""
    traced = None

    def call(*arguments):
        nonlocal traced
        if traced is None:  # with real tensors; those that torch.compile passes to a backend have no contents
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.jit.trace", category=DeprecationWarning)
                traced = torch.jit.trace(graph, arguments, check_trace=False, strict=False)
        return traced(*arguments)

    return call


@functools.cache
def compiled_run(backend: str) -> Callable:
    """`run`, compiled at its first call and again for other shapes or another model."""
    return torch.compile(run, backend=trace if backend == "trace" else backend, dynamic=False)
