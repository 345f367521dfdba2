"""Fill: an image and a mask of what to paint, as 320 more channels of each noise token."""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.conditions.base import Encode, encoding, prepare_with
from flux.errors import InputError
from flux.images.io import ImageLike, as_rgb, to_tensor
from flux.images.masks import OPAQUE, take_mask
from flux.images.sizes import TOKEN
from flux.inputs import Condition
from flux.modules.autoencoder import AutoEncoder
from flux.sampling.latents import pack


def fill_images(image: ImageLike, mask: ImageLike) -> tuple[Image.Image, Image.Image]:
    """Read an image and its mask, and check that they go together. Nothing heavy is loaded for it.

    Args:
        image: The image, of mode RGB, or its file. Its sides are multiples of 16.
        mask: White where the image is to be painted, or its file: see `flux.images.masks.take_mask`.

    Returns:
        The image, of mode RGB, and the mask, of mode "L": white or black in each pixel, as greys are nearer.

    Raises:
        InputError: One of them cannot be read, the mask has another size or no white, or the image's sides
            are not multiples of 16.
    """
    source, painted = as_rgb(image), take_mask(mask)
    if painted.size != source.size:
        raise InputError(
            f"Got a mask of {painted.width}x{painted.height} pixels for an image of {source.width}x"
            f"{source.height}: make them of one size"
        )
    if source.width % TOKEN or source.height % TOKEN:
        fitting = "x".join(str(side // TOKEN * TOKEN) for side in source.size)
        raise InputError(
            f"Got an image of {source.width}x{source.height} pixels to fill: both sides must be multiples of "
            f"{TOKEN}, crop it and its mask to {fitting}, or give that as width and height"
        )
    white = np.asarray(painted) >= OPAQUE
    if not white.any():
        raise InputError("Got a mask that is black all over: paint white what is to be filled")
    return source, Image.fromarray(np.where(white, 255, 0).astype(np.uint8))


def fill_condition(encode: Encode, image: ImageLike, mask: ImageLike) -> Condition:
    """Make the condition of the Fill model: the image without what is to be painted, and the mask.

    The mask keeps its full resolution: a token has the 256 pixels that it covers.

    Args:
        encode: Encodes pixels.
        image: See `fill_images`.
        mask: See there.

    Raises:
        InputError: As `fill_images`.
    """
    source, painted = fill_images(image, mask)
    white = torch.from_numpy(np.asarray(painted) > 0).float()[None, None]
    latent = encode(to_tensor(source)[None] * (1 - white))
    pixels = pack(rearrange(white, "b 1 (h y) (w x) -> b (y x) h w", y=8, x=8))
    return Condition(channels=torch.cat((latent, pixels.to(latent)), dim=2))


def paste_unmasked(filled: Image.Image, image: Image.Image, mask: Image.Image) -> Image.Image:
    """Put the pixels that the mask leaves black back into a filled image, exactly.

    The autoencoder changes them a little.

    Args:
        filled: The image that the model made.
        image: The image that was filled, see `fill_images`.
        mask: Its mask, likewise.
    """
    return Image.composite(filled, image, mask)


def prepare_fill(
    t5: Callable,
    clip: Callable,
    img: Tensor,
    prompt: str | list[str],
    ae: AutoEncoder,
    img_cond_path: ImageLike,
    mask_path: ImageLike,
) -> dict[str, Tensor]:
    """Make everything that `denoise` needs with the Fill model. Upstream's call.

    Args:
        t5: See `flux.sampling.prepare`.
        clip: See there.
        img: Start noise of the image's size, "B 16 h w".
        prompt: See there.
        ae: The autoencoder.
        img_cond_path: The image, or its file: see `fill_images`.
        mask_path: Its mask, or the mask's file, likewise.

    Raises:
        InputError: As `fill_images`, or the noise is for an image of another size.
    """
    image, mask = fill_images(img_cond_path, mask_path)
    height, width = (8 * side for side in img.shape[-2:])
    if image.size != (width, height):
        raise InputError(
            f"Got noise for an image of {width}x{height} pixels, but one of {image.width}x{image.height} to "
            "fill: make noise of its size"
        )
    return prepare_with(t5, clip, img, prompt, fill_condition(encoding(ae), image, mask))
