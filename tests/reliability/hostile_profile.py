"""How many cases the fuzz tests try: 200 each, or with HYPOTHESIS_PROFILE=thorough 10,000 each (`make fuzz`)."""

import os
from contextlib import contextmanager

import pytest


hypothesis = pytest.importorskip("hypothesis")

common = {
    "deadline": 20_000,
    "database": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "print_blob": True,
}
hypothesis.settings.register_profile("ordinary", max_examples=200, derandomize=True, **common)
hypothesis.settings.register_profile("thorough", max_examples=10_000, **common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ordinary"))


@contextmanager
def documented():
    """In here, a case ends in success or in ValueError or OSError with a message."""
    try:
        yield
    except (ValueError, OSError) as error:
        assert str(error).strip()
