"""Images that a program hands over, as files or as images, in place of the fields that name files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from flux.images.io import as_rgb
from flux.images.masks import take_mask

Images = Image.Image | list[Image.Image]


@dataclass(frozen=True, eq=False)
class GivenImages:
    """The images of a call, by the fields of the settings that would name their files.

    Attributes:
        images: The images. Masks have mode "L", all others RGB.
        names: The files that settings name for them. An image that came from no file will have that name once
            the result is saved.
        unfiled: The images that came from no file.
    """

    images: dict[str, Images]
    names: dict[str, str | list[str]]
    unfiled: dict[str, Images]

    def one(self, field: str) -> Image.Image | None:
        """Return the single image of a field, if there is one."""
        image = self.images.get(field)
        return image if isinstance(image, Image.Image) else None


def take_images(fields: Mapping[str, Any]) -> GivenImages:
    """Read the images of a call.

    Args:
        fields: By field, an image (a path, a PIL image or a NumPy array) or a list of them. If None, there is
            none.

    Raises:
        InputError: An image cannot be read.
    """
    images: dict[str, Images] = {}
    names: dict[str, Any] = {}
    unfiled: dict[str, Images] = {}
    for field, value in fields.items():
        if value is None:
            continue
        read = take_mask if field == "mask" else as_rgb
        if isinstance(value, list | tuple):
            images[field] = [read(each) for each in value]
            are_files = all(isinstance(each, str | os.PathLike) for each in value)
            names[field] = [os.fspath(each) for each in value] if are_files else file_names(field, len(value))
        else:
            images[field] = read(value)
            are_files = isinstance(value, str | os.PathLike)
            names[field] = os.fspath(value) if are_files else f"{field}.png"
        if not are_files:
            unfiled[field] = images[field]
    return GivenImages(images, names, unfiled)


def file_names(field: str, count: int) -> list[str]:
    """Return the names of the files for several images of a field."""
    return [f"{field}_{number}.png" for number in range(count)]
