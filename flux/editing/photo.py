"""Photographs of any size on their way into an edit and back, and masks of what the edit may change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.errors import InputError
from flux.images.sizes import TOKEN

WHITE = 128  # of 255: greys of a mask from here on count as white


class Mask(NamedTuple):
    """The part of its source that an edit may change.

    Attributes:
        image: The part, painted white.
        tokens: Its tokens, "1 I 1", bool.
    """

    image: Image.Image
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Photograph:
    """A photograph, and the part of it that is edited: the largest part of the edit's shape, in the middle.

    Attributes:
        whole: The photograph itself.
        box: The part's left, top, right and bottom in it, in whole pixels.
        part: The part, scaled to the edit's size.
    """

    whole: Image.Image
    box: tuple[int, int, int, int]
    part: Image.Image

    @classmethod
    def of(cls, image: Image.Image, width: int, height: int) -> "Photograph":
        """Cut out the part that an edit of width x height pixels changes.

        Raises:
            InputError: A side of the photograph is shorter than a token.
        """
        if min(image.size) < TOKEN:
            raise InputError(
                f"Got a photo of {image.width}x{image.height} pixels: expected at least {TOKEN} to a side"
            )
        box = middle(image.size, width, height)
        return cls(image, box, image.crop(box).resize((width, height), Image.Resampling.LANCZOS))

    def with_part(self, part: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """Put an edited part back into the photograph.

        Args:
            part: The edit, of any size.
            mask: Where it is black the photograph stays, where it is grey both are mixed. It has the size of
                the whole or of the part.

        Returns:
            A copy of the photograph, outside the box unchanged.
        """
        left, top, right, bottom = self.box
        size, whole = (right - left, bottom - top), self.whole.copy()
        if mask is not None:
            is_whole, mask = mask.size == whole.size, mask.convert("L")
            mask = mask.crop(self.box) if is_whole else mask.resize(size, Image.Resampling.BILINEAR)
        whole.paste(part.resize(size, Image.Resampling.LANCZOS), (left, top), mask)
        return whole


def middle(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """Find the largest box of the shape width x height in the middle of an image of that size."""
    scale = min(size[0] / width, size[1] / height)
    across, down = max(1, round(scale * width)), max(1, round(scale * height))
    left, top = (size[0] - across) // 2, (size[1] - down) // 2
    return left, top, left + across, top + down


def token_mask(mask: Image.Image, sizes: Sequence[tuple[int, int]], width: int, height: int) -> Tensor:
    """Convert a painted mask to tokens: those with any white in them may change.

    Args:
        mask: White where the edit may change. Greys count as the nearer of black and white.
        sizes: The sizes that the mask may have: the photograph's, of which the same part is taken, or the
            edit's.
        width: Width of the edit in pixels.
        height: Height of the edit in pixels.

    Returns:
        "1 I 1", bool.

    Raises:
        InputError: A mask of another size, or without white where the edit is.
    """
    if mask.size not in sizes:
        got, expected = (
            f"{mask.width}x{mask.height}",
            " or ".join(f"{w}x{h}" for w, h in dict.fromkeys(sizes)),
        )
        raise InputError(f"Got a mask of {got} pixels: expected {expected}, scale it to the image's size")
    part = mask.convert("L").crop(middle(mask.size, width, height))
    white = torch.from_numpy(np.asarray(part) >= WHITE)[None, None].float()
    # The maximum, so that thin strokes survive being scaled down.
    white = torch.nn.functional.adaptive_max_pool2d(white, (height // TOKEN, width // TOKEN))[0, 0] > 0
    if not white.any():
        raise InputError(
            "Got a mask that is black all over, or not painted: paint white what the edit may change"
        )
    return rearrange(white, "h w -> 1 (h w) 1")


def mask_image(tokens: Tensor, width: int, height: int) -> Image.Image:
    """Convert a mask of tokens, "I 1", to an image with soft edges."""
    rows = tokens.reshape(height // TOKEN, width // TOKEN).to("cpu", torch.uint8).numpy() * 255
    return Image.fromarray(rows).resize((width, height), Image.Resampling.BILINEAR)
