"""Painted masks: images that say what an edit may change."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from flux.images.io import read_upright

OPAQUE = 128  # of 255: from here on a pixel counts as painted
MANY_COLOURS = 24  # more than a painter's palette: a photograph


def read_mask(path: str | Path) -> Image.Image:
    """Reads a painted mask without its metadata, see `as_mask`.

    Raises:
        InputError: as `flux.images.io.read_upright`.
    """
    mask = as_mask(read_upright(path))
    mask.info.clear()
    return mask


def as_mask(image: Image.Image) -> Image.Image:
    """Converts what was painted to a mask: white where the edit may change, black where not, mode "L".

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
    red, green, blue = (np.asarray(colours)[painted] >> 4).astype(np.int32).T
    if np.count_nonzero(np.bincount(red << 8 | green << 4 | blue)) > MANY_COLOURS:
        return ImageChops.invert(alpha)
    paint = ImageChops.multiply(_brightest(colours), alpha)
    is_black = (np.asarray(paint) < OPAQUE).all()
    return alpha if is_black else paint


def _brightest(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return ImageChops.lighter(ImageChops.lighter(red, green), blue)
