"""An image that is to be continued beyond its edges: a canvas around it, and the mask of what is new."""

import math

import numpy as np
from PIL import Image

from flux.errors import InputError

MULTIPLE = 32  # of the canvas's sides in pixels

Borders = tuple[float, float, float, float]
"""Borders on the left, on the right, above and below, as fractions of the image's width or height."""


def outpaint(
    image: Image.Image, borders: float | Borders, overlap: float = 0.01
) -> tuple[Image.Image, Image.Image]:
    """Put an image on a larger canvas, and mask the border.

    The canvas's sides are rounded up to multiples of 32. What that adds goes to the side with the larger
    border. The image itself is neither scaled nor cropped.

    Args:
        image: The image, of mode RGB.
        borders: A fraction for all four sides, or one for each.
        overlap: How far the mask reaches into the image from each border, as a fraction of the image's width
            or height, so that the model can blend both.

    Returns:
        The canvas, black in the border, and the mask, of mode "L": white where the canvas is to be painted.

    Raises:
        InputError: There is no border, a fraction is negative, or the mask would cover the whole image.
    """
    left, right, above, below = borders if isinstance(borders, tuple) else (borders,) * 4
    if min(left, right, above, below, overlap) < 0 or max(left, right, above, below) == 0:
        raise InputError(
            f"Got borders {left:g}, {right:g}, {above:g}, {below:g} and overlap {overlap:g}: expected a "
            "border on a side at least, and no negative fraction"
        )
    across, width, kept_across = _axis(image.width, left, right, overlap)
    down, height, kept_down = _axis(image.height, above, below, overlap)
    if not (kept_across and kept_down):
        raise InputError(f"Got overlap {overlap:g}, which leaves nothing of the image: make it smaller")
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image, (across, down))
    mask = np.full((height, width), 255, np.uint8)
    mask[kept_down.start : kept_down.stop, kept_across.start : kept_across.stop] = 0
    return canvas, Image.fromarray(mask)


def _axis(side: int, before: float, after: float, overlap: float) -> tuple[int, int, range]:
    """Lay out one axis of the canvas.

    Args:
        side: Side of the image in pixels.
        before: Border before it, as a fraction of the side.
        after: Border after it.
        overlap: How far the mask reaches into the image, likewise.

    Returns:
        Where the image begins, the side of the canvas, and the pixels that the mask leaves as they are.
    """
    start, end = round(side * before), round(side * after)
    canvas = math.ceil((start + side + end) / MULTIPLE) * MULTIPLE
    if before > after:
        start = canvas - end - side
    reach = round(side * overlap)
    first = start + (reach if start else 0)
    last = start + side - (reach if start + side < canvas else 0)
    return start, canvas, range(first, last)
