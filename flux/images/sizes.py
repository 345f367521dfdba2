"""Sizes of images in pixels, by their shape."""

import math

from PIL import Image

TOKEN = 16  # a token's side in pixels


def natural_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Choose the size in which a model works on an image.

    Args:
        image: The image, whose shape is kept.
        side: Side of a square whose area the result is to have.

    Returns:
        Width and height, each rounded to the nearest multiple of 16.
    """
    shape = (image.width / image.height) ** 0.5
    width, height = (max(TOKEN, round(length / TOKEN) * TOKEN) for length in (side * shape, side / shape))
    return width, height


def size_of_ratio(ratio: float, area: int) -> tuple[int, int]:
    """Choose the size of an image of a given shape, as upstream does.

    Args:
        ratio: Width by height.
        area: Pixels of the image, about.

    Returns:
        Width and height, each rounded down to a multiple of 16.
    """
    width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(TOKEN, width // TOKEN * TOKEN), max(TOKEN, height // TOKEN * TOKEN)
