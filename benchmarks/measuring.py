"""What the scripts here share: seconds of several ways that take turns, and the peak of resident memory."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path


def medians(ways: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Median seconds of each way; all take turns, so that a busy moment of the machine meets all of them."""
    seconds = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if repetition:  # the first does not count
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def resident_peak() -> int:
    """Largest resident size of this process since it was set back, in bytes; Linux counts it."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def extra_memory(way: Callable) -> int:
    """Bytes by which the resident peak grows while `way` runs."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    way()
    return resident_peak() - before
