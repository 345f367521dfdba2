"""Redux: images as text tokens behind those of the prompt."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from flux.conditions.base import check_strength, prepare_with, read_images
from flux.images.io import ImageLike
from flux.inputs import Condition

ImageEncoder = Callable[[Image.Image], Tensor]
"""Encodes an image to text tokens, "1 n features": see `flux.modules.image_embedders.ReduxImageEncoder`."""


def redux_condition(
    encoder: ImageEncoder, images: ImageLike | Sequence[ImageLike], strength: float = 1.0
) -> Condition:
    """Make the condition of Redux: text tokens for each image.

    Args:
        encoder: Encodes an image.
        images: One image or several, whose tokens stand in a row.
        strength: Factor of the tokens. Below 1, the prompt counts for more.

    Raises:
        InputError: There is no image, one cannot be read, or the strength is negative.
    """
    check_strength(strength)
    tokens = torch.cat([encoder(image) for image in read_images(images)], dim=1)
    return Condition(txt=tokens if strength == 1 else strength * tokens)


def prepare_redux(
    t5: Callable,
    clip: Callable,
    img: Tensor,
    prompt: str | list[str],
    encoder: ImageEncoder,
    img_cond_path: ImageLike | Sequence[ImageLike],
) -> dict[str, Tensor]:
    """Make everything that `denoise` needs with Redux. Upstream's call.

    Args:
        t5: See `flux.sampling.prepare`.
        clip: See there.
        img: Start noise, "B 16 h w".
        prompt: See there.
        encoder: Encodes an image.
        img_cond_path: The image or its file, or several.

    Raises:
        InputError: As `redux_condition`.
    """
    return prepare_with(t5, clip, img, prompt, redux_condition(encoder, img_cond_path))
