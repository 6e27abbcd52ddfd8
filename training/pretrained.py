"""Networks that others have trained: the first one that can be had here, and why it is not a better one.

Their weights come with a package, lie in torch's cache (`torch.hub.get_dir()`), or are downloaded into it. They are read as
tensors alone: nothing in a file of weights is run.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


# no such package, one that does not fit this torch, no weights in the cache and no network, weights of another network
UNAVAILABLE = (ImportError, OSError, RuntimeError)


@contextmanager
def tensors_only() -> Iterator[None]:
    """In here `torch.load` reads tensors and nothing else, also where another library calls it."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def first_available(networks: Iterable[type[nn.Module]]) -> tuple[nn.Module | None, list[str]]:
    """The first of the networks that can be had, None if none can, and what was in the way of those before it."""
    reasons = []
    for network in networks:
        try:
            with tensors_only():
                return network(), reasons
        except UNAVAILABLE as error:
            reasons.append(f"no {network.title}: {str(error).splitlines()[0]}")
    return None, reasons
