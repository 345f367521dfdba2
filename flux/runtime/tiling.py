"""Decode and encode images in overlapping tiles, with the memory of one tile whatever the image's size."""

from collections.abc import Callable
from itertools import chain, product

import torch
from torch import Tensor

TILE, OVERLAP = 64, 16  # positions of a latent, 8 pixels each


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, ratio: float) -> Tensor:
    """Compute `function(x)` tile by tile and blend neighbouring tiles where they overlap.

    The result differs slightly, because normalisation and attention see one tile at a time.

    Args:
        function: A decoder or an encoder.
        x: Its input, "B C h w".
        ratio: Side of the output divided by the side of the input: 8 for a decoder, 1/8 for an encoder.
    """
    unit = 1 if ratio > 1 else round(1 / ratio)
    tile, overlap = TILE * unit, OVERLAP * unit
    height, width = x.shape[-2:]
    if height <= tile and width <= tile:
        return function(x)
    corners = list(product(starts(height, tile, overlap), starts(width, tile, overlap)))
    outputs = (function(x[..., top : top + tile, left : left + tile]).float() for top, left in corners)
    first = next(outputs)
    sides = round(height * ratio), round(width * ratio)
    total, weights = first.new_zeros(*first.shape[:-2], *sides), first.new_zeros(sides)
    for (top, left), output in zip(corners, chain((first,), outputs), strict=True):
        rows, columns = (_fade(side, round(overlap * ratio), output) for side in output.shape[-2:])
        weight = rows[:, None] * columns
        top, left = round(top * ratio), round(left * ratio)
        where = (..., slice(top, top + len(rows)), slice(left, left + len(columns)))
        total[where] += weight * output
        weights[where] += weight
    return (total / weights).to(x.dtype)


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side: at equal distances, except the last, which ends with it."""
    last = max(side - tile, 0)
    return [*range(0, last, tile - overlap), last]


def _fade(side: int, overlap: int, like: Tensor) -> Tensor:
    """The weights of a tile along one side: they fall towards both ends over the overlap, never to zero."""
    positions = torch.arange(1, side + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(positions, positions.flip(0)).clamp(max=overlap)
