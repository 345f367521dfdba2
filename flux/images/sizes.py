"""Sizes of images in pixels, by their shape."""

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
