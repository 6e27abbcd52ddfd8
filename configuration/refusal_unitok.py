"""Whatever is wrong in a file from a stranger ends in a ValueError that names the file.

Parsers and constructors trip over hostile input in their own ways: a KeyError here, a RecursionError there. Who loads a
file wants to know one thing: which file, and that it is of no use.
"""

import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


# What says already what it has to say, and what is no fault of the file: a missing package, too little memory.
PASSED_ON = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def refused_in_words(what: str, refusal: type[ValueError] = ValueError) -> Iterator[None]:
    """In here, every exception but those of PASSED_ON becomes a `refusal` that begins with `what`."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else f"{type(error).__name__}: {error}"
        raise refusal(f"{what}: {kind}") from error


def require_plain_keys(names: Iterable[str], owner: type, what: str) -> None:
    """Raises ValueError if values of these names would replace methods or computed attributes of a class."""
    for name in names:
        found = getattr(owner, str(name), None)
        computed = isinstance(found, property) and found.fset is None
        if not isinstance(name, str) or name.startswith("__") or callable(found) or computed:
            raise ValueError(f"{what} has the key {reprlib.repr(name)}, which names a part of {owner.__name__} itself")


def require_size(name: str, value: object, most: int) -> None:
    """Raises ValueError unless a size is a whole number in [1, most]."""
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number, got {reprlib.repr(value)}")
    if not 1 <= value <= most:
        bound = "at least 1" if value < 1 else f"at most {most:,}"
        raise ValueError(f"{name} must be {bound}, got {reprlib.repr(value)}")
