"""A photograph of any size on its way into an edit and back, and masks of where the edit may change it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.errors import InputError

TOKEN = 16  # a token's side in pixels
WHITE = 128  # of 255, from where on a mask's grey counts as white


def natural_size(image: Image.Image, side: int) -> tuple[int, int]:
    """Width and height in which to edit a photograph: its own shape, the area of a square of that side, each
    side rounded to the nearest multiple of 16.
    """
    shape = (image.width / image.height) ** 0.5
    width, height = (max(TOKEN, round(length / TOKEN) * TOKEN) for length in (side * shape, side / shape))
    return width, height


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph and its part that is edited: the largest one of the edit's shape, in the middle, scaled to
    the edit's size.

    Attributes:
        whole: the photograph itself.
        box: the part's left, top, right and bottom in it, whole pixels.
        part: that part in the edit's size.
    """

    whole: Image.Image
    box: tuple[int, int, int, int]
    part: Image.Image

    @classmethod
    def of(cls, image: Image.Image, width: int, height: int) -> "Photograph":
        """Raises InputError for a photograph with less than a token to a side."""
        if min(image.size) < TOKEN:
            raise InputError(
                f"Got a photo of {image.width}x{image.height} pixels: expected at least {TOKEN} to a side"
            )
        box = middle(image.size, width, height)
        return cls(image, box, image.crop(box).resize((width, height), Image.Resampling.LANCZOS))

    def with_part(self, part: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """The whole photograph with an edited part in its place, outside the box untouched.

        Args:
            mask: in the size of the whole or of the part: also untouched where it is black, mixed where it is
                grey.
        """
        left, top, right, bottom = self.box
        size, whole = (right - left, bottom - top), self.whole.copy()
        if mask is not None:
            mask = mask.convert("L")
            mask = (
                mask.crop(self.box)
                if mask.size == whole.size
                else mask.resize(size, Image.Resampling.BILINEAR)
            )
        whole.paste(part.resize(size, Image.Resampling.LANCZOS), (left, top), mask)
        return whole


def middle(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The largest box of the shape width x height in the middle of a picture of that size."""
    scale = min(size[0] / width, size[1] / height)
    across, down = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (size[0] - across) // 2, (size[1] - down) // 2
    return left, top, left + across, top + down


def token_mask(mask: Image.Image, sizes: Sequence[tuple[int, int]], width: int, height: int) -> Tensor:
    """Which tokens of a picture of width x height may change, "1 I 1", bool: those with any white in them.

    Args:
        mask: white where the edit may change; greys count as the nearer of black and white.
        sizes: those it may have: the photograph's own, of which the same part is taken, or the edit's.

    Raises:
        InputError: a mask of another size, or without white where the edit is.
    """
    if mask.size not in sizes:
        sizes_text = " or ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes))
        raise InputError(f"Got a mask of {mask.width}x{mask.height} pixels: expected {sizes_text}")
    # The largest grey of a pixel's surroundings, that thin strokes survive being scaled down.
    part = mask.convert("L").crop(middle(mask.size, width, height))
    white = torch.from_numpy(np.asarray(part) >= WHITE)[None, None].float()
    white = torch.nn.functional.adaptive_max_pool2d(white, (height // TOKEN, width // TOKEN))[0, 0] > 0
    if not white.any():
        raise InputError("Got a mask that is black all over: paint white what the edit may change")
    return rearrange(white, "h w -> 1 (h w) 1")


def mask_picture(tokens: Tensor, width: int, height: int) -> Image.Image:
    """A mask of tokens, "I 1", as a picture with soft edges."""
    rows = tokens.reshape(height // TOKEN, width // TOKEN).to("cpu", torch.uint8).numpy() * 255
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BILINEAR)
