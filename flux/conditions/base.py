"""The parts that all conditions share: reading and encoding images, and upstream's arguments of `denoise`."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from flux.errors import InputError
from flux.images.io import ImageLike, as_rgb
from flux.inputs import Condition
from flux.modules.autoencoder import AutoEncoder
from flux.sampling.latents import pack, prepare

Encode = Callable[[Tensor], Tensor]
"""Encodes pixels in -1..1, "1 3 H W", to a packed latent, "1 I 64", as `LoadedModel` does."""


def read_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """Read one image or several, see `flux.images.io.as_rgb`.

    Raises:
        InputError: There is none, or one cannot be read.
    """
    many = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    if not many:
        raise InputError("Got an empty list of images: give one or more")
    return [as_rgb(image) for image in many]


def check_strength(strength: float) -> None:
    """Raise InputError if a condition cannot have that strength."""
    if not 0 <= strength < float("inf"):
        raise InputError(
            f"Got the strength {strength:g} of a condition: expected 0 or more; 1 changes nothing"
        )


def encoding(ae: AutoEncoder) -> Encode:
    """Make a function that encodes pixels with an autoencoder, where and in what that computes."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return pack(ae.encode(pixels.to(next(ae.parameters()))))

    return encode


def prepare_with(
    t5: Callable, clip: Callable, img: Tensor, prompt: str | list[str], condition: Condition
) -> dict[str, Tensor]:
    """Make everything that `flux.sampling.denoise` needs, with a condition, under upstream's names.

    Args:
        t5: See `flux.sampling.prepare`, like the next three.
        clip: See there.
        img: See there.
        prompt: See there.
        condition: With one row, or one for each of the batch.
    """
    given = prepare(t5, clip, img, prompt)
    batch = len(given["img"])
    condition = condition.to(given["img"]).expanded(batch)
    if condition.txt is not None:
        given["txt"] = torch.cat((given["txt"], condition.txt.to(given["txt"])), dim=1)
        given["txt_ids"] = torch.zeros(batch, given["txt"].shape[1], 3, device=img.device)
    named = {
        "img_cond": condition.channels,
        "img_cond_seq": condition.context,
        "img_cond_seq_ids": condition.context_ids,
    }
    return given | {name: x for name, x in named.items() if x is not None}
