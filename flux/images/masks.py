"""Painted masks: images that say what an edit may change."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from flux.errors import warn
from flux.images.io import ImageLike, as_pil, read_upright

OPAQUE = 128  # of 255: from here on a pixel counts as painted
MANY_COLOURS = 24  # more than a painter's palette: a photograph


def read_mask(path: str | Path) -> Image.Image:
    """Read a painted mask without its metadata, see `as_mask`. Warn of one that is a photograph.

    Raises:
        InputError: As `flux.images.io.read_upright`.
    """
    image = read_upright(path)
    mask = as_mask(image)
    if not image.has_transparency_data and _count_colours(image.convert("RGB")) > MANY_COLOURS:
        warn(f"{path} looks like a photograph, not like a mask: where it is bright, the image may change")
    mask.info.clear()
    return mask


def take_mask(mask: ImageLike) -> Image.Image:
    """Return a mask of a program, or that of a file, see `as_mask`.

    Args:
        mask: A path, a PIL image, or a NumPy array, see `flux.images.io.as_pil`.

    Raises:
        InputError: As `read_mask` and `as_pil`.
    """
    return (
        read_mask(os.path.expanduser(mask)) if isinstance(mask, str | os.PathLike) else as_mask(as_pil(mask))
    )


def as_mask(image: Image.Image) -> Image.Image:
    """Convert what was painted to a mask: white where the edit may change, black where not, mode "L".

    Without transparency, bright colours are white: a colour counts by its brightest channel, so red counts as
    much as white. With transparency there are three cases:

    - Paint on a transparent layer: white or coloured paint may change. Black paint and what is not painted
      may not.
    - Black paint alone on a transparent layer may change, since nothing else can be meant.
    - A photograph with a hole, that is opaque pixels of many colours: the hole may change.
    """
    if not image.has_transparency_data:
        return _brightest(image.convert("RGB"))
    image = image.convert("RGBA")
    alpha, colours = image.getchannel("A"), image.convert("RGB")
    painted = np.asarray(alpha) >= OPAQUE
    if painted.all() or not painted.any():
        return ImageChops.multiply(_brightest(colours), alpha)
    if np.count_nonzero(_histogram(np.asarray(colours)[painted])) > MANY_COLOURS:
        return ImageChops.invert(alpha)
    paint = ImageChops.multiply(_brightest(colours), alpha)
    is_black = (np.asarray(paint) < OPAQUE).all()
    return alpha if is_black else paint


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Count the pixels, "N 3", of each colour in 16 levels a channel."""
    red, green, blue = (pixels >> 4).astype(np.int32).T
    return np.bincount(red << 8 | green << 4 | blue)


def _count_colours(image: Image.Image) -> int:
    """Count the colours of a thousandth of the image or more. JPEG makes others at the edges of paint."""
    pixels = np.asarray(image).reshape(-1, 3)
    return int(np.count_nonzero(_histogram(pixels) * 1000 >= len(pixels)))


def _brightest(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)
