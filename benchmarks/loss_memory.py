"""Peak memory and time of the loss: ours in slices against all logits at once.

python benchmarks/loss_memory.py

4,096 labelled tokens of width 256, 66,560 rows of vocabulary, NanoChat's softcap, forward and backward, fp32. The two take
turns in one process. Memory is the growth of the process's resident peak (Linux counts it; `clear_refs` sets it back),
gradients included; the median over the repetitions, as is the time.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from measuring import extra_memory

from unitok_hf.modeling_unitok.loss_unitok import sliced_cross_entropy


CAP = 15.0


def measure(loss, hidden: torch.Tensor, head: torch.nn.Linear) -> tuple[float, int]:
    """Seconds and bytes of a forward and backward pass."""
    hidden.grad = head.weight.grad = None
    begin = time.perf_counter()
    grown = extra_memory(lambda: loss().backward())
    return time.perf_counter() - begin, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=66560)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    head = torch.nn.Linear(256, options.vocabulary, bias=False)
    hidden = torch.randn(options.tokens, 256, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,))

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return CAP * torch.tanh(head(rows) / CAP)

    ways = {
        "all logits": lambda: F.cross_entropy(logits(hidden), targets, reduction="sum"),
        "ours": lambda: sliced_cross_entropy(
            hidden, targets, torch.ones(len(targets)), logits, head.parameters(), options.vocabulary
        )[0],
    }
    found = {name: [] for name in ways}
    for _ in range(options.repetitions):
        for name, loss in ways.items():
            found[name].append(measure(loss, hidden, head))
    seconds, bytes_ = ({name: statistics.median(column) for name, column in kind.items()} for kind in split(found))
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.repetitions}")
    print("| loss | seconds | peak MiB |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {seconds[name]:.2f} | {bytes_[name] / 2**20:.0f} |")
    time_ratio, memory_ratio = (kind["ours"] / kind["all logits"] for kind in (seconds, bytes_))
    print(f"| ours / all logits | {time_ratio:.2f} | {memory_ratio:.3f} |")


def split(found: dict[str, list[tuple[float, int]]]) -> tuple[dict, dict]:
    """Seconds of each way, and bytes of each way."""
    return tuple({name: [pair[part] for pair in pairs] for name, pairs in found.items()} for part in (0, 1))


if __name__ == "__main__":
    main()
