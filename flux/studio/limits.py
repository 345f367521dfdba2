"""Limits on what one visitor may ask for, and checks of uploaded images."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.images.masks import read_mask
from flux.images.outpaint import Borders
from flux.images.sizes import TOKEN
from flux.settings.resolved import ResolvedModel
from flux.specs import ModelSpec

LORA_BYTES = 512 * 2**20
"""Largest LoRA of a model that is not part of the package: rank 64 in all layers of FLUX.1, in 16 bits."""
_DECODING = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """The largest request that the studio accepts.

    Attributes:
        side: Largest width or height of an image, in pixels.
        area: Largest width times height of an image, in pixels.
        scale: Largest distilled guidance or true CFG.
        steps: Most denoising steps.
        images: Most images in one run.
        edits: Most edits in one run, further turns included.
        prompts: Most prompts in one scan.
        contexts: Most context images of one instruction.
        letters: Most characters in one text.
        upload_bytes: Largest uploaded image file, in bytes.
        lora_bytes: Largest uploaded LoRA, in bytes.
        upload_pixels: Largest uploaded image, in pixels.
        waiting: Most runs that wait for the model, of all visitors.
        waiting_each: Most runs that one page or program may have among them.
        visit_bytes: Most bytes of one visit's runs. Beyond, its oldest runs are deleted.
        disk_bytes: Most bytes of everything that is written. Beyond, uploads and runs are refused.
    """

    side: int
    area: int
    scale: float = 100.0
    steps: int = 100
    images: int = 4
    edits: int = 6
    prompts: int = 64
    contexts: int = 3
    letters: int = 4000
    upload_bytes: int = 20 * 2**20
    lora_bytes: int = 20 * 2**20
    upload_pixels: int = 50_000_000
    waiting: int = 64
    waiting_each: int = 8
    visit_bytes: int = 500 * 2**20
    disk_bytes: int = 20 * 2**30

    @classmethod
    def of(cls, spec: ModelSpec) -> "Limits":
        """Allow twice the model's own side, twice its own area, and a LoRA as large as such models have."""
        lora_bytes = LORA_BYTES if spec.folder is None else cls.lora_bytes
        return cls(side=2 * spec.size, area=2 * spec.size**2, lora_bytes=lora_bytes)

    @property
    def file_bytes(self) -> int:
        """Largest uploaded file of any kind, in bytes."""
        return max(self.upload_bytes, self.lora_bytes)

    def check_size(self, settings: ResolvedModel) -> None:
        """Raise InputError for an image that is too large, or takes too many steps or too much guidance."""
        width, height = settings.width, settings.height
        if max(width, height) > self.side or width * height > self.area:
            raise InputError(
                f"Got a size of {width}x{height}, expected sides of at most {self.side} and an area of at "
                f"most {self.area} pixels: choose a smaller one"
            )
        if settings.num_steps > self.steps:
            raise InputError(f"Got {settings.num_steps} steps, expected at most {self.steps}")
        for name, scale in (("guidance", settings.guidance), ("true_cfg", settings.true_cfg)):
            if scale > self.scale:
                raise InputError(f"Got {name} {scale:g}, expected at most {self.scale:g}")

    def fill_size(self, image: tuple[int, int], borders: Borders = (0, 0, 0, 0)) -> tuple[int, int]:
        """Choose the size in which an image is filled. It is scaled down if it is too large, never up.

        Args:
            image: Width and height of the image.
            borders: What is painted around it, as fractions of its sides: left, right, above, below.

        Returns:
            Width and height, multiples of 16 unless there are borders: the frame is rounded then.
        """
        left, right, above, below = borders
        width, height = image[0] * (1 + left + right), image[1] * (1 + above + below)
        shrink = min(1.0, self.side / width, self.side / height, (self.area / (width * height)) ** 0.5)
        if any(borders):
            # The frame is rounded up.
            while shrink < 1 and (ceil(width * shrink / 32) * ceil(height * shrink / 32) * 32**2 > self.area):
                shrink *= 0.99
            return max(1, int(image[0] * shrink)), max(1, int(image[1] * shrink))
        wide, high = (max(TOKEN, int(side * shrink) // TOKEN * TOKEN) for side in image)
        return wide, high

    def check_texts(self, texts: Sequence[str], most: int, kind: str) -> None:
        """Raise InputError for too many texts, or a text that is too long.

        Args:
            texts: The texts to check.
            most: How many texts are allowed.
            kind: What the texts are, for the message: "edits".
        """
        if len(texts) > most:
            raise InputError(f"Got {len(texts)} {kind}, expected at most {most}")
        if (longest := max((len(text) for text in texts), default=0)) > self.letters:
            raise InputError(f"Got a text of {longest} letters, expected at most {self.letters}")

    def read_upload(self, upload: Any, inside: Path, is_mask: bool = False) -> Image.Image:
        """Read an uploaded image as bare pixels.

        Args:
            upload: What a browser or a program sent: `{"path": ...}` if it is valid.
            inside: The folder that uploads are written to.
            is_mask: Whether it is a mask, of any size.

        Raises:
            InputError: The upload is not an image in the folder `inside`, or it is too large or too small.
        """
        path = uploaded_file(upload, inside)
        if path is None:
            raise InputError("Got an image that was not uploaded, or that was deleted: upload it first")
        if (size := path.stat().st_size) > self.upload_bytes:
            most = self.upload_bytes // 2**20
            raise InputError(f"Got an image of {size // 2**20} MB, expected at most {most}: scale it down")
        try:
            with Image.open(path) as opened:
                pixels = opened.width * opened.height
        except Exception:
            pixels = 0  # read_image says what is wrong with the file
        if pixels > self.upload_pixels:
            most = self.upload_pixels // 10**6
            raise InputError(f"Got {pixels // 10**6} million pixels, expected at most {most}: scale it down")
        try:
            # One at a time: decoded, an image may take a thousand times its file's bytes.
            with _DECODING:
                image = read_mask(path) if is_mask else read_image(path)
        except InputError as error:
            # The visitor knows the file by its name, and should not learn the server's folders.
            raise InputError(str(error).replace(str(path), path.name)) from None
        if min(image.size) < TOKEN and not is_mask:
            raise InputError(
                f"Got an image of {image.width}x{image.height} pixels, expected at least {TOKEN} to a side"
            )
        return image


def uploaded_file(upload: Any, inside: Path) -> Path | None:
    """Return the path of an uploaded file, or None unless it is a file in the folder `inside`."""
    try:
        path = Path(upload["path"]).resolve()
        return path if path.is_relative_to(inside.resolve()) and path.is_file() else None
    except (TypeError, KeyError, ValueError, OSError):  # also a zero byte in the name, or too long a name
        return None
