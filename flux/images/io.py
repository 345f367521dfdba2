"""Images in and out: conversion to tensors, reading, scaling, writing with metadata.

Outside the models an image is a PIL image of mode RGB. Inside it is a float tensor in -1..1, "C H W".
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from flux.errors import InputError, warn
from flux.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
JPEG_METADATA = 2**16 - 2**10  # bytes of comment and EXIF that pillow's buffer for a JPEG's header holds


# ---- tensors


def to_uint8(x: "Tensor") -> np.ndarray:
    """Convert a tensor in -1..1, "... C H W", to an array "... H W C" of levels 0..255.

    Values are rounded to the nearest level; values outside -1..1 are clipped.

    Raises:
        InputError: A value is NaN, from an overflow or from the weights.
    """
    x = x.detach().float()
    if x.isnan().any():
        raise InputError(
            "Got images full of NaN: either the models overflowed in float16 (choose dtype bfloat16 or "
            "float32), or the weights or a LoRA hold NaN (leave out the LoRA, or get the file again)"
        )
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(-3, -1).cpu().numpy()


def to_pil(x: "Tensor") -> Image.Image:
    """Convert a tensor in -1..1, "3 H W", to an RGB image."""
    return Image.fromarray(to_uint8(x))


def to_tensor(image: Image.Image) -> "Tensor":
    """Convert an image to a float32 tensor in -1..1, "3 H W"; `to_pil` restores the same image exactly."""
    import torch

    levels = torch.from_numpy(np.array(image.convert("RGB")))
    return (levels.float() / 127.5 - 1).permute(2, 0, 1)


# ---- reading


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB and upright (EXIF orientation applied), without its metadata.

    Transparent parts become white; 16-bit greys are scaled to 8 bits; colours of an embedded profile
    (Display P3, Adobe RGB, ...) are converted to sRGB. A broken profile is ignored, with a warning.

    Raises:
        InputError: As `read_upright`.
    """
    with _opened(path) as file:
        rgb = _as_rgb(_upright(file, path), path)
    rgb.info.clear()
    return rgb


def as_rgb(image: ImageLike) -> Image.Image:
    """Return an image of a program as `read_image` returns that of a file: RGB and upright.

    Args:
        image: A path, a PIL image, or a NumPy array, see `as_pil`.

    Raises:
        InputError: As `read_image` and `as_pil`.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(os.path.expanduser(image))
    image = as_pil(image)
    if image.mode == "F":
        raise InputError("Got an image of floating-point numbers of unknown range: convert it to RGB")
    rgb = _as_rgb(_upright(image, "the image"), "the image").copy()
    rgb.info.clear()
    return rgb


def as_pil(image: Image.Image | np.ndarray) -> Image.Image:
    """Return a NumPy array as an image: levels 0..255 of type uint8, "H W" or "H W C", or bool, "H W".

    Raises:
        InputError: It is another array, or nothing that holds an image.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, np.ndarray):
        raise InputError(f"Got {type(image).__name__}, expected a path, a PIL image or a NumPy array")
    if image.dtype == bool:
        image = image.astype(np.uint8) * 255
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        shape = "x".join(map(str, image.shape))
        raise InputError(
            f"Got an array of type {image.dtype} and shape {shape}: expected levels 0..255 of type uint8, "
            "height x width x 3"
        )
    return Image.fromarray(image)


def read_upright(path: str | Path) -> Image.Image:
    """Read an image file upright (EXIF orientation applied), in 8 bits of its own colours and transparency.

    Raises:
        InputError: The file is missing, not an image, damaged or cut short, an animation, or has more pixels
            than pillow considers safe (PIL.Image.MAX_IMAGE_PIXELS). The message names the file.
    """
    with _opened(path) as file:
        return _upright(file, path)


def image_size(path: str | Path) -> tuple[int, int]:
    """Return width and height of an image file without decoding it, before EXIF turns it upright.

    Raises:
        InputError: The file is not a readable image.
    """
    with _opened(path) as image:
        return image.size


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Read the metadata that `save_image` wrote. Return None if the image has none.

    Raises:
        InputError: The file is not a readable image.
    """
    with _opened(path) as image:
        chunk, comment = image.info.get("flux"), image.info.get("comment")
    try:
        data = json.loads(chunk) if chunk else json.loads(comment or "")["flux"]
    except (TypeError, ValueError, KeyError):
        return None  # no metadata, or another program's
    return data if isinstance(data, dict) else None


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file without decoding it. Any problem with the file raises InputError."""
    if not os.path.isfile(path):
        problem = "is a folder" if os.path.isdir(path) else "is not there"
        raise InputError(f"Got the image {path}, which {problem}: expected a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
        raise InputError(f"Got the image {path} of more than {limit}: scale it down first") from error
    except Image.UnidentifiedImageError as error:
        raise InputError(f"Got {path}, not a readable image: expected PNG, JPEG or WebP") from error
    except Exception as error:  # damage makes pillow raise OSError, SyntaxError, struct.error and more
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read the image {path} ({reason}): expected an undamaged file") from error


def _upright(image: Image.Image, path: str | Path) -> Image.Image:
    # MPO is the JPEG of a camera or phone. After its first image come previews and depth maps.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise InputError(
            f"Got {path}, which holds {frames} images (animation or pages), but expected one: "
            "save the one you mean as PNG or JPEG"
        )
    image.load()
    upright: Image.Image = image
    with suppress(Exception):  # an image with broken EXIF is still an image
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("its colours are floating-point numbers of unknown range")
    if upright.mode.startswith("I"):  # pillow's own conversion would make everything above 255 white
        eight_bits = Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8))
        eight_bits.info = upright.info
        # Beside 16 bits, the key colour that is transparent has 16 bits too.
        if isinstance(key := eight_bits.info.pop("transparency", None), int):
            eight_bits.putalpha(Image.fromarray(((np.asarray(upright) != key) * 255).astype(np.uint8)))
        upright = eight_bits
    return upright


def _as_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    profile, alpha = image.info.get("icc_profile"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile:
        image = _in_srgb(image, profile, path)
    if alpha:
        image = image.convert("RGB")
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes, path: str | Path) -> Image.Image:
    """Convert colours of an embedded profile to sRGB. Those that are sRGB already stay bit for bit."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}[profile[16:20]]  # colour space of the header
        converted = ImageCms.profileToProfile(
            image if image.mode == mode else image.convert(mode),
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return converted or image  # it is None only where an image is changed in place
    except Exception:  # pillow raises OSError, PyCMSError, ValueError and more
        warn(f"Got {path}, whose colour profile is broken: its colours are taken for sRGB")
        return image


# ---- scaling


def crop_to_fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale an image until it covers width x height pixels, and cut out its middle."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a copy of an image, scaled down if a side is longer than `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    return small


# ---- writing


def save_image(image: Image.Image, path: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a PNG or JPEG, by the name's suffix. Missing folders are created.

    The file is written whole or not at all. If writing fails, an older file of that name stays.

    Args:
        image: An RGB image.
        path: File name, ending in .png, .jpg or .jpeg.
        metadata: Any JSON object, to be read by `read_metadata`. It becomes the text chunk "flux" of a PNG
            and the comment of a JPEG. As in upstream, EXIF then says that the image is generated, with the
            "model" and "prompt" found in the metadata. If None, neither is written. Texts too long for a
            JPEG are cut, and a line on stderr says so.

    Raises:
        InputError: Another suffix, or the file cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"Got {path} as the name of an image: expected it to end in .png, .jpg or .jpeg")
    options: dict[str, Any] = {}
    if suffix == ".png":
        options["format"] = "PNG"
        if metadata is not None:
            options["exif"] = _exif(metadata)
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt("flux", json.dumps(metadata, ensure_ascii=False))
    else:
        # Full colour resolution, as upstream has it: the watermark is in the colour channels.
        options |= {"format": "JPEG", "quality": 95, "subsampling": 0}
        if metadata is not None:
            fitting = _fit_jpeg(metadata)
            if fitting != metadata:
                print(f"{path}: metadata are cut, since a JPEG holds only 64 KiB of them", file=sys.stderr)
            options |= {"exif": _exif(fitting), "comment": _comment(fitting)}
    buffer = BytesIO()
    image.save(buffer, **options)
    write_bytes(path, buffer.getvalue())


def _fit_jpeg(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata with texts cut so that a JPEG holds them, and without the rest if need be."""
    single = {name: value for name, value in metadata.items() if not isinstance(value, dict | list | tuple)}
    for longest in (None, 6000, 1000):
        short = {name: value[:longest] if isinstance(value, str) else value for name, value in single.items()}
        for fitting in (metadata | short, short):
            if len(_comment(fitting)) + len(_exif(fitting).tobytes()) <= JPEG_METADATA:
                return fitting
    return {}


def _comment(metadata: dict[str, Any]) -> bytes:
    return json.dumps({"flux": metadata}, ensure_ascii=False).encode()


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
    """Write images of one size as an endless GIF or WebP, by the name's suffix.

    Raises:
        InputError: Another suffix, or the file cannot be written.
    """
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
