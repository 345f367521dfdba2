"""Canny and Depth: a map of the image to make, as 64 more channels of each noise token."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from flux.conditions.base import Encode, encoding, prepare_with
from flux.errors import InputError
from flux.images.io import ImageLike, as_rgb, to_tensor
from flux.images.sizes import TOKEN
from flux.inputs import Condition
from flux.modules.autoencoder import AutoEncoder

MapEncoder = Callable[[Tensor], Tensor]
"""Draws the map of an image, "1 3 H W" in -1..1 both: see `flux.modules.image_embedders`."""


def control_condition(
    encode: Encode, image: ImageLike, width: int, height: int, encoder: MapEncoder | None = None
) -> Condition:
    """Make the condition of the Canny and Depth models.

    Args:
        encode: Encodes pixels.
        image: An image of the shape of the image to make, which is scaled to its size.
        width: Width of the image to make in pixels, a multiple of 16.
        height: Height of the image to make in pixels, a multiple of 16.
        encoder: Draws the map. If None, `image` is the map already.

    Raises:
        InputError: The image cannot be read, or has another shape.
    """
    source = as_rgb(image)
    check_shape(source, width, height)
    return _condition(encode, source, width, height, encoder)


def check_shape(image: Image.Image, width: int, height: int) -> None:
    """Raise InputError if a control image has another shape than the image to make.

    Args:
        image: The control image.
        width: Width of the image to make in pixels.
        height: Height of the image to make in pixels.
    """
    # Sizes are rounded to whole tokens: one side may be a token from that of the image's shape.
    across, down = image.width * height / image.height, image.height * width / image.width
    if min(abs(across - width), abs(down - height)) > TOKEN:
        raise InputError(
            f"Got a control image of {image.width}x{image.height} pixels for an image of {width}x{height}: "
            "crop it to that shape, or choose a size of its own shape"
        )


def prepare_control(
    t5: Callable,
    clip: Callable,
    img: Tensor,
    prompt: str | list[str],
    ae: AutoEncoder,
    encoder: MapEncoder | None,
    img_cond_path: ImageLike,
) -> dict[str, Tensor]:
    """Make everything that `denoise` needs with the Canny and Depth models. Upstream's call.

    Args:
        t5: See `flux.sampling.prepare`.
        clip: See there.
        img: Start noise, "B 16 h w".
        prompt: See there.
        ae: The autoencoder.
        encoder: Draws the map. If None, the image is the map already.
        img_cond_path: The image, or its file. It is scaled to the size of the image to make, whatever its
            shape.

    Raises:
        InputError: The image cannot be read.
    """
    height, width = (8 * side for side in img.shape[-2:])
    condition = _condition(encoding(ae), as_rgb(img_cond_path), width, height, encoder)
    return prepare_with(t5, clip, img, prompt, condition)


def _condition(
    encode: Encode, image: Image.Image, width: int, height: int, encoder: MapEncoder | None
) -> Condition:
    pixels = to_tensor(image.resize((width, height), Image.Resampling.LANCZOS))[None]
    return Condition(channels=encode(encoder(pixels) if encoder else pixels))
