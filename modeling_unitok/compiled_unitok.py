"""One step of the language model, as it is or compiled.

On a CPU, a small model spends half of a step between its operations: in modules, decorators and look-ups. Two ways out, both
through `torch.compile`, which checks that what it saw when it compiled still holds (adapters, types, shapes …):

- "trace": the operations in their order, run by TorchScript's interpreter. Ready in a second or two, needs no compiler,
  gives the very same numbers. For CPUs
- any other name is a backend of `torch.compile`: "inductor" also fuses operations, which takes a C++ compiler and up to a
  minute, and is what GPUs want

What a step takes are the same tensors every time, with other contents. So what `torch.compile` checks is checked at the first
step of a call of `generate` alone; with "trace", the others are the operations of the first, run again.

The mask, the cache and the position of a step are tensors of fixed shapes, so the step is compiled once per batch size and
length of the cache, which is rounded up to a multiple of `COLUMNS`.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar

import torch
from torch import nn
from transformers import Cache


COLUMNS = 32
MANY = 2**20

# Where `trace` notes what it ran, as something to call again, and what that gave.
RAN: ContextVar[list[tuple[Callable, tuple[torch.Tensor, ...]]] | None] = ContextVar("RAN", default=None)


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
        outputs = traced(*arguments)
        ran = RAN.get()
        if ran is not None:
            ran.append((functools.partial(traced, *arguments), outputs))
        return outputs

    return call


@functools.cache
def compiled_run(backend: str) -> Callable:
    """`run`, compiled at its first call and again for other shapes or another model."""
    return torch.compile(run, backend=trace if backend == "trace" else backend, dynamic=False)


class CompiledStep:
    """`run` with tensors whose contents change from call to call.

    Args:
        backend: of `compiled_run`.
        language_model, ids, mask, position_ids, cache: as `run` takes them.
    """

    def __init__(self, backend: str, language_model: nn.Module, ids, mask, position_ids, cache: Cache):
        self.run = functools.partial(compiled_run(backend), language_model, ids, mask, position_ids, cache)
        self.known = False
        self.again: Callable[[], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """Hidden states (R, D)."""
        if self.again is not None:
            return self.again()
        ran: list[tuple[Callable, tuple[torch.Tensor, ...]]] = []
        token = RAN.set(ran)
        try:
            with (
                # all shapes and models share one code object, for which torch.compile would soon give up
                torch._dynamo.config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY),
                torch.compiler.set_stance(skip_guard_eval_unsafe=True) if self.known else nullcontext(),
            ):
                hidden = self.run()
        finally:
            RAN.reset(token)
        self.known = True
        if len(ran) == 1:  # the whole step is one graph
            operations, outputs = ran[0]
            places = [place for place, output in enumerate(outputs) if output is hidden]
            self.again = (lambda: operations()[places[0]]) if places else None
        return hidden
