"""The arguments of a call as settings of a demo: images in place of files, types of other libraries."""

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from flux.conditions.images import ConditionImages, read_conditions, sized
from flux.errors import InputError
from flux.images.given import GivenImages, take_images
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings, with_fields

S = TypeVar("S", bound=ModelSettings)

IMAGE_FIELDS = {"image", "photo", "context", "fill", "mask", "control", "redux"}
MASK_WORDS = ("auto", "none")  # in place of a mask


def read_model(arguments: Mapping[str, Any]) -> ModelSettings:
    """Make the settings of a model from the arguments of `Pipeline.load`.

    Raises:
        InputError: A value cannot be used.
    """
    return check_settings(ModelSettings, _plain(arguments))


def read_arguments(
    cls: type[S], model: ModelSettings, arguments: Mapping[str, Any]
) -> tuple[S, ConditionImages, GivenImages]:
    """Make the settings of a call, in the size that its images ask for.

    Args:
        cls: Class of the settings.
        model: The model, and how it runs.
        arguments: Values by field. One that is None keeps its default. Where settings name files of images,
            these may be images too.

    Returns:
        The settings, the images that steer the run, and all images of the call.

    Raises:
        InputError: A value cannot be used, or an image cannot be read.
    """
    images = take_images({name: value for name, value in arguments.items() if _is_image(name, value)})
    settings = with_fields(cls, model, _plain({**arguments, **images.names}))
    conditions = read_conditions(settings, images.images)
    return sized(settings, conditions), conditions, images


def read_file_arguments(cls: type[S], model: ModelSettings, arguments: Mapping[str, Any]) -> S:
    """Make the settings of a call that can resume, as `read_arguments` does. Its images must be files.

    Raises:
        InputError: As `read_arguments`, or an image is none of a file.
    """
    settings, _, images = read_arguments(cls, model, arguments)
    if images.unfiled:
        field = next(iter(images.unfiled))
        raise InputError(
            f"Got {field} as an image: save it, and give its file, so that a stopped run can resume"
        )
    return settings


def _is_image(field: str, value: Any) -> bool:
    """Return whether the value of a field is an image or its file."""
    return field in IMAGE_FIELDS and not (isinstance(value, str) and value in MASK_WORDS)


def _plain(value: Any) -> Any:
    """Return a value in the types of settings: paths as texts, NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | range | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value
