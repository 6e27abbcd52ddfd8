"""A large picture in overlapping tiles of the size that the tokenizer was trained on.

    0                                  extent
    [     tile 0     ]                           starts spread evenly, so that every tile is full
               [     tile 1     ]
    [ owned by 0  ][  owned by 1    ]            encoding: a code is read in the tile whose rim is farther away
    [ tile 0 ][ mix  ][  tile 1     ]            decoding: across the overlap, pixels are mixed linearly

- encoding mixes nothing: the mean of two latents is one that no encoder gave, and its code might be a third one. The
  codes are a function of the picture, the tile size and the overlap alone.
- tiling is an approximation. Group normalisation and attention look at the whole picture, in a tile at the tile, as they
  did in training. Where neither is at work, codes and pixels at least a receptive field from the inner rims are those of
  the whole picture.

Tiles are cut along each axis apart; here is the geometry of one axis.
"""

import torch


def tile_starts(extent: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `extent`, neighbours sharing at least `overlap`; [0] when one tile is enough."""
    if extent <= tile:
        return [0]
    count = -(-(extent - overlap) // (tile - overlap))
    return [index * (extent - tile) // (count - 1) for index in range(count)]


def owned_spans(starts: list[int], tile: int, extent: int) -> list[tuple[int, int]]:
    """The span of each tile, in coordinates of the whole, that is nearer to its centre than to any other's."""
    cuts = [(left + tile + right) // 2 for left, right in zip(starts, starts[1:], strict=False)]
    return list(zip([0, *cuts], [*cuts, extent], strict=True))


def blend_weights(starts: list[int], tile: int, extent: int) -> torch.Tensor:
    """(tiles, min(tile, extent)) weights of each tile's positions; at every position of the whole they sum to one."""
    tile = min(tile, extent)
    weights = torch.ones(len(starts), tile)
    for index, (left, right) in enumerate(zip(starts, starts[1:], strict=False)):
        shared = left + tile - right
        ramp = (torch.arange(shared) + 0.5) / shared
        weights[index, tile - shared :] *= 1 - ramp
        weights[index + 1, :shared] *= ramp
    total = torch.zeros(extent)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return torch.stack([weight / total[s : s + tile] for s, weight in zip(starts, weights, strict=True)])
