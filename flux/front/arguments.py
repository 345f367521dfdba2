"""The arguments of a call as settings of a demo: images in place of files, types of other libraries."""

import os
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeVar

import numpy as np
import torch

from flux.conditions.images import ConditionImages, read_conditions, sized
from flux.errors import InputError
from flux.images.given import GivenImages, take_images
from flux.settings.command_line import kinds_of
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings, with_fields

S = TypeVar("S", bound=ModelSettings)

IMAGE_FIELDS = {"image", "photo", "context", "fill", "mask", "control", "redux"}
MASK_WORDS = ("auto", "none")  # in place of a mask
OF_LOADING = (
    "model", "weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "lora", "lora_weights",
    "lora_scale", "device", "dtype", "offload", "quantize", "t5", "tiled", "compile",
)  # fmt: skip
"""Fields that have an effect only while a model is loaded."""


def read_model(arguments: Mapping[str, Any]) -> ModelSettings:
    """Make the settings of a model from the arguments of `Pipeline.load`.

    Raises:
        InputError: A value cannot be used.
    """
    _check_no_folder(arguments)
    return check_settings(ModelSettings, _with_lists(ModelSettings, _plain(arguments)))


def read_arguments(
    cls: type[S],
    model: ModelSettings,
    arguments: Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
) -> tuple[S, ConditionImages, GivenImages]:
    """Make the settings of a call, in the size that its images ask for.

    Args:
        cls: Class of the settings.
        model: The model, and how it runs.
        arguments: Values by field. One that is None keeps its default. Where settings name files of images,
            these may be images too.
        folder: The folder that the call writes to. If None, it writes none.

    Returns:
        The settings, the images that steer the run, and all images of the call.

    Raises:
        InputError: A value cannot be used, an image cannot be read, or an argument is none of a call.
    """
    _check_no_folder(arguments)
    images = take_images({name: value for name, value in arguments.items() if _is_image(name, value)})
    given = _plain({**arguments, **images.names, "output_dir": folder})
    settings = with_fields(cls, model, _with_lists(cls, given))
    if others := [name for name in OF_LOADING if getattr(settings, name) != getattr(model, name)]:
        raise InputError(f"Got {', '.join(others)} for a model that is loaded: give that to Pipeline.load")
    if getattr(settings, "parallel", 1) != 1:
        raise InputError(
            "Got parallel: a Pipeline uses one GPU, give parallel to a demo that torchrun starts"
        )
    conditions = read_conditions(settings, images.images)
    return sized(settings, conditions), conditions, images


def read_file_arguments(
    cls: type[S], model: ModelSettings, arguments: Mapping[str, Any], folder: str | os.PathLike[str]
) -> S:
    """Make the settings of a call that can resume, as `read_arguments` does. Its images must be files.

    Raises:
        InputError: As `read_arguments`, or an image is none of a file.
    """
    settings, _, images = read_arguments(cls, model, arguments, folder)
    if images.unfiled:
        field = next(iter(images.unfiled))
        raise InputError(
            f"Got {field} as an image: save it, and give its file, so that a stopped run can resume"
        )
    return settings


def _check_no_folder(arguments: Mapping[str, Any]) -> None:
    """Raise InputError if the field that names a demo's folder is given, since only some calls write."""
    if "output_dir" in arguments:
        raise InputError(
            "Got output_dir: give the folder to the result's save, or to skip and scan as folder"
        )


def _is_image(field: str, value: Any) -> bool:
    """Return whether the value of a field is an image or its file."""
    return field in IMAGE_FIELDS and not (isinstance(value, str) and value in MASK_WORDS)


def _with_lists(cls: type[ModelSettings], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with a list of one for a single entry, where only a list can be meant."""
    found = dict(arguments)
    for name in found.keys() & cls.model_fields.keys():
        kinds = kinds_of(cls.model_fields[name].annotation)
        if tuple in kinds and found[name] is not None and not isinstance(found[name], (list, *kinds)):
            found[name] = [found[name]]
    return found


def _plain(value: Any) -> Any:
    """Return a value in the types of settings: paths and PyTorch's names as texts, NumPy's numbers, lists."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple | range | Set | Iterator | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return os.fspath(value) if isinstance(value, os.PathLike) else value
