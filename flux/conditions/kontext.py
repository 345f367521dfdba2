"""Kontext: images to work from, as context tokens behind the noise tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from flux.conditions.base import Encode, check_strength, encoding, prepare_with, read_images
from flux.errors import InputError
from flux.images.io import ImageLike, to_tensor
from flux.images.sizes import TOKEN
from flux.inputs import Condition
from flux.modules.autoencoder import AutoEncoder
from flux.sampling.latents import get_noise, image_ids

SIDE = 1024  # of the square that has as many pixels as the sizes below

_NARROW = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
PREFERED_KONTEXT_RESOLUTIONS = (*_NARROW, (1024, 1024), *((h, w) for w, h in reversed(_NARROW)))
"""The sizes that Kontext was trained with, width and height, from narrow to wide."""

Method = Literal["index", "offset"]
"""How the positions of several context images differ.

By their index 1, 2, 3 and so on, with rows and columns that begin at 0 in each image. Or by rows and columns
alone, as if the images, of index 1 all, were laid out side by side or one below the other.
"""


def aspect_ratio_to_height_width(aspect_ratio: str, area: int = SIDE**2) -> tuple[int, int]:
    """The width and height, in this order, of so many pixels in a shape such as "16:9", in whole tokens.

    Raises:
        InputError: It is not a shape.
    """
    try:
        across, down = (float(part) for part in aspect_ratio.split(":"))
        ratio = across / down
        width, height = (round((area * x) ** 0.5) // TOKEN * TOKEN for x in (ratio, 1 / ratio))
    except (ValueError, ArithmeticError, TypeError) as error:
        raise InputError(f"Got the aspect ratio {aspect_ratio!r}: expected two numbers, as 16:9") from error
    if min(width, height) < TOKEN:
        raise InputError(f"Got the aspect ratio {aspect_ratio!r}, too narrow for an image")
    return width, height


def kontext_size(width: int, height: int, side: int = SIDE) -> tuple[int, int]:
    """The preferred size whose shape is the nearest to that of an image, width and height in pixels.

    Args:
        width: Width of the image.
        height: Its height.
        side: Side of the square that has about as many pixels as the result, for models of other sizes.
    """
    _, across, down = min((abs(width / height - w / h), w, h) for w, h in PREFERED_KONTEXT_RESOLUTIONS)
    if side == SIDE:
        return across, down
    across, down = (max(TOKEN, TOKEN * round(side * x / SIDE / TOKEN)) for x in (across, down))
    return across, down


def kontext_condition(
    encode: Encode,
    images: ImageLike | Sequence[ImageLike],
    side: int = SIDE,
    method: Method = "index",
    strength: float = 1.0,
) -> Condition:
    """Make the condition of the Kontext model: context tokens, with positions of their own.

    Args:
        encode: Encodes pixels.
        images: One image or several. Each is scaled to the preferred size of the nearest shape.
        side: See `kontext_size`.
        method: How the positions of several images differ.
        strength: See `flux.inputs.Condition.context_strength`.

    Raises:
        InputError: There is no image, one cannot be read, or the strength is negative.
    """
    check_strength(strength)
    sources = read_images(images)
    sizes = [kontext_size(*source.size, side) for source in sources]
    tokens = [
        encode(to_tensor(source.resize(size, Image.Resampling.LANCZOS))[None])
        for source, size in zip(sources, sizes)
    ]
    ids = context_ids(sizes, method).to(tokens[0].device)
    return Condition(context=torch.cat(tokens, dim=1), context_ids=ids, context_strength=strength)


def context_ids(sizes: Sequence[tuple[int, int]], method: Method = "index") -> Tensor:
    """The positions of the tokens of context images, "1 J 3".

    Args:
        sizes: Width and height of each image in pixels.
        method: How the positions differ. With "offset", each image is put on the right of all before it, or
            below them, where the whole comes out nearer to a square.
    """
    every, across, down = [], 0, 0
    for index, (width, height) in enumerate(sizes, start=1):
        rows, columns = height // TOKEN, width // TOKEN
        if method == "index":
            every.append(image_ids(1, height, width, "cpu", index))
            continue
        below = rows + down <= columns + across
        offset = (down, 0) if below else (0, across)
        every.append(image_ids(1, height, width, "cpu", 1) + torch.tensor([0, *offset]))
        across, down = max(across, columns + offset[1]), max(down, rows + offset[0])
    return torch.cat(every, dim=1)


def prepare_kontext(
    t5: Callable,
    clip: Callable,
    prompt: str | list[str],
    ae: AutoEncoder,
    img_cond_path: ImageLike | Sequence[ImageLike],
    seed: int,
    device: torch.device | str,
    target_width: int | None = None,
    target_height: int | None = None,
    bs: int = 1,
) -> tuple[dict[str, Tensor], int, int]:
    """Make everything that `denoise` needs with the Kontext model, from the noise on. Upstream's call.

    Args:
        t5: See `flux.sampling.prepare`.
        clip: See there.
        prompt: See there.
        ae: The autoencoder.
        img_cond_path: The context image or its file, or several.
        seed: Seed of the noise, which is in bfloat16.
        device: Device of the result.
        target_width: Width of the image to make in pixels. If None, that of the first context image, once
            scaled.
        target_height: Its height, likewise.
        bs: Number of images.

    Returns:
        The arguments of `denoise`, and height and width of the image to make.

    Raises:
        InputError: As `kontext_condition`.
    """
    sources = read_images(img_cond_path)
    condition = kontext_condition(encoding(ae), sources)
    width, height = kontext_size(*sources[0].size)
    width, height = target_width or width, target_height or height
    noise = get_noise(1, height, width, device, torch.bfloat16, seed).expand(bs, -1, -1, -1)
    return prepare_with(t5, clip, noise, prompt, condition), height, width
