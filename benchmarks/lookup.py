"""Time and memory of the codebook lookup: `nearest_codes` against `torch.cdist(...).argmin(...)`.

python benchmarks/lookup.py

16,384 latents, 16,384 codes, of width 8 and 16, in fp32; a smaller codebook beside it. The two take turns. Memory is the
growth of the process's resident peak, each measured first in a fresh process. The last column is the share of latents whose
code is that of float64.
"""

import argparse
import multiprocessing
from functools import partial

import torch
from measuring import extra_memory, medians

from unitok_hf.modeling_unitok.modeling_vq import nearest_codes


SIZES = [(16384, 16384, 8), (16384, 16384, 16), (16384, 1024, 16), (512, 1024, 16)]


def cdist_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    return torch.cdist(latents, codebook).argmin(dim=1)


WAYS = {"cdist": cdist_codes, "ours": nearest_codes}


def rows_and_codes(n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


def memory(name: str, size: tuple[int, int, int]) -> int:
    """Bytes beyond latents and codebook; a first call on a few rows has loaded the libraries."""
    latents, codebook = rows_and_codes(*size)
    WAYS[name](latents[:16], codebook[:16])
    return extra_memory(lambda: WAYS[name](latents, codebook))


def exact(latents: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    parts = latents.double().split(256)
    return torch.cat([torch.cdist(part, codebook.double()).argmin(dim=1) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.repetitions}")
    print(
        "| N x K x d | cdist s | ours s | ours / cdist | cdist MB | ours MB | as float64 |\n|---|---|---|---|---|---|---|"
    )
    for size in SIZES:
        latents, codebook = rows_and_codes(*size)
        ways = {name: partial(way, latents, codebook) for name, way in WAYS.items()}
        seconds = medians(ways, options.repetitions)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks = {name: pool.apply(memory, (name, size)) / 1e6 for name in WAYS}
        right = (nearest_codes(latents, codebook) == exact(latents, codebook)).double().mean().item()
        print(
            f"| {' x '.join(map(str, size))} | {seconds['cdist']:.4f} | {seconds['ours']:.4f} "
            f"| {seconds['ours'] / seconds['cdist']:.2f} | {peaks['cdist']:.0f} | {peaks['ours']:.0f} | {right:.4%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
