"""Pictures in and out: reading and writing with metadata, sheets of pictures with captions.

Outside the nets a picture is a PIL image of mode RGB; inside it is a float tensor `C H W` in -1..1. Every
file is written whole or not at all: its bytes go to a hidden file beside it, which then takes its name.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from flux.errors import InputError
from flux.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor


# Tensors


def to_uint8(x: "Tensor") -> np.ndarray:
    """Tensor `... C H W` in -1..1 -> array `... H W C` of 0..255, rounded to the nearest; values beyond are
    cut.

    Raises InputError if a value is not a number, the usual outcome of an overflow in float16.
    """
    x = x.detach().float()
    if x.isnan().any():
        raise InputError("Got pictures full of NaN: the nets overflowed, choose dtype bfloat16 or float32")
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_pil(x: "Tensor") -> Image.Image:
    """Tensor `3 H W` in -1..1 -> RGB picture."""
    return Image.fromarray(to_uint8(x))


def to_tensor(image: Image.Image) -> "Tensor":
    """Picture -> float32 tensor `3 H W` in -1..1; `to_pil` gives exactly the same picture back."""
    import torch

    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return (levels.float() / 127.5 - 1).permute(2, 0, 1)


# Reading


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, as RGB and upright (EXIF orientation applied), free of metadata.

    Transparent parts lie on white; 16-bit greys are scaled to 8. Raises InputError, naming the file, if it is
    missing, not a picture, damaged or cut short, an animation, or of more pixels than pillow deems safe
    (PIL.Image.MAX_IMAGE_PIXELS).
    """
    with _opened(path) as image:
        # MPO is a JPEG of a camera or phone: what follows its first picture are previews and depth maps of it
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
            raise InputError(
                f"Got {path}, which holds {image.n_frames} pictures (animation or pages), but expected one: "
                "save the one you mean as PNG or JPEG"
            )
        image.load()
        with suppress(Exception):  # a picture with garbage for EXIF is still a picture
            image = ImageOps.exif_transpose(image)
        image = _as_rgb(image)
    image.info.clear()
    return image


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """What `save_image` was given as metadata, or None if the picture has none.

    Raises InputError where there is no picture to be read.
    """
    with _opened(path) as image:
        chunk, comment = image.info.get("flux"), image.info.get("comment")
    try:
        data = json.loads(chunk) if chunk else json.loads(comment)["flux"]
    except (TypeError, ValueError, KeyError):
        return None  # there is nothing, or it is another program's
    return data if isinstance(data, dict) else None


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture in a file, not yet decoded; whatever turns out to be wrong with it raises InputError."""
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "is not there"
        raise InputError(f"Got the picture {path}, which {what}: expected a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise InputError(f"Got the picture {path} of more than {limit}: scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"Got {path}, not a picture that can be read: expected PNG, JPEG or WebP") from error
    except Exception as error:  # damage makes pillow raise OSError, SyntaxError, struct.error and more
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read the picture {path} ({reason}): expected an undamaged file") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its colours are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # pillow's own conversion would make everything above 255 white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled until it covers width x height pixels, and its middle cut out."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


# Writing


def save_image(image: Image.Image, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Writes a PNG or JPEG (by the name's suffix), making its folder if need be.

    `metadata` (anything that JSON can say) goes in whole, for `read_metadata`: in a PNG as the text chunk
    "flux", in a JPEG as the comment. As upstream does, EXIF tells that the picture is generated, with the
    "model" and the "prompt" found in it. Without metadata nothing of the kind is written. Raises InputError
    for another suffix and where the file cannot be written; the older file of that name then stays.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"Got {path} as the name of a picture: expected it to end in .png, .jpg or .jpeg")
    options: dict[str, Any] = {} if metadata is None else {"exif": _exif(metadata)}
    if suffix == ".png":
        options["format"] = "PNG"
        if metadata is not None:
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt("flux", json.dumps(metadata, ensure_ascii=False))
    else:
        # full colour resolution: upstream's numbers, and the watermark lives in the colour channels
        options |= {"format": "JPEG", "quality": 95, "subsampling": 0}
        if metadata is not None:
            options["comment"] = json.dumps({"flux": metadata}, ensure_ascii=False).encode()
    buffer = BytesIO()
    image.save(buffer, **options)
    write_bytes(path, buffer.getvalue())


def _exif(metadata: dict[str, Any]) -> Image.Exif:
    model = str(metadata.get("model", "flux"))
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "AI generated;txt2img;flux"
    if "nano" not in model:  # flux-nano is not Black Forest Labs' work
        exif[ExifTags.Base.Make] = "Black Forest Labs"
    exif[ExifTags.Base.Model] = model.encode()
    if metadata.get("prompt"):
        # as bytes, since pillow would write "?" for every é of a str
        exif[ExifTags.Base.ImageDescription] = str(metadata["prompt"]).encode()
    return exif


def save_animation(images: Sequence[Image.Image], path: str | Path, seconds_per_frame: float) -> None:
    """Writes pictures of one size as an endless GIF or WebP (by the name's suffix). Raises InputError as
    `save_image`."""
    formats = {".gif": "GIF", ".webp": "WEBP"}
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise InputError(f"Got {path} as the name of an animation: expected it to end in .gif or .webp")
    buffer = BytesIO()
    images[0].save(
        buffer,
        format=formats[suffix],
        save_all=True,
        append_images=images[1:],
        duration=round(seconds_per_frame * 1000),
        loop=0,
        quality=90,
    )
    write_bytes(path, buffer.getvalue())


# Sheets
