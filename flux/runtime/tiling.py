"""Decoding and encoding in overlapping tiles: the memory of one tile, whatever the picture's size."""

from collections.abc import Callable

import torch
from torch import Tensor

TILE, OVERLAP = 64, 16  # places of a latent, each 8 pixels


def in_tiles(net: Callable[[Tensor], Tensor], x: Tensor, ratio: float) -> Tensor:
    """`net(x)` of "B C h w", worked out tile by tile, neighbours fading into one another where they overlap.

    Nearly the same only: a tile's normalisation and attention know of no other tile.

    Args:
        ratio: the output's side over the input's: 8 for a decoder, 1/8 for an encoder.
    """
    unit = 1 if ratio > 1 else round(1 / ratio)
    tile, overlap = TILE * unit, OVERLAP * unit
    height, width = x.shape[-2:]
    if height <= tile and width <= tile:
        return net(x)
    total = weights = 0
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            part = net(x[..., top : top + tile, left : left + tile]).float()
            if isinstance(total, int):
                sides = round(height * ratio), round(width * ratio)
                total = part.new_zeros(*part.shape[:-2], *sides)
                weights = part.new_zeros(sides)
            rows, columns = (_fade(side, round(overlap * ratio), part) for side in part.shape[-2:])
            weight = rows[:, None] * columns
            begin = round(top * ratio), round(left * ratio)
            where = (..., *(slice(at, at + side) for at, side in zip(begin, part.shape[-2:])))
            total[where] += weight * part
            weights[where] += weight
    return (total / weights).to(x.dtype)


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: in equal steps, but for the last, which ends where the side does."""
    last = max(side - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _fade(side: int, overlap: int, like: Tensor) -> Tensor:
    """A tile's weight along one side: falling towards both ends over the overlap, never zero."""
    places = torch.arange(1, side + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(places, places.flip(0)).clamp(max=overlap)
