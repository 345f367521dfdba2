"""From the settings that the user wrote to those that run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import overload

from flux.errors import InputError
from flux.files import claim_folder
from flux.intervention import check_layers
from flux.settings.ablate import AblateSettings
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import (
    GenerateSettings,
    LayerSettings,
    ModelSettings,
    ScanSettings,
    SessionSettings,
    SkipSettings,
)
from flux.settings.edits import EditSettings
from flux.settings.effect import print_warnings
from flux.settings.files import PROGRAMS
from flux.settings.fitting import check_conditions
from flux.settings.resolved import (
    ResolvedAblate,
    ResolvedEdit,
    ResolvedGenerate,
    ResolvedLayer,
    ResolvedModel,
    ResolvedScan,
    ResolvedSession,
    ResolvedSkip,
    ResolvedTrain,
)
from flux.settings.train import TrainSettings
from flux.specs import get_spec

MOST_PIXELS = 2**30 // 12
"""Pixels of the largest image that pillow reads without a warning (PIL.Image.MAX_IMAGE_PIXELS)."""

RESOLVED: dict[type[ModelSettings], type[ResolvedModel]] = {
    GenerateSettings: ResolvedGenerate,
    LayerSettings: ResolvedLayer,
    SkipSettings: ResolvedSkip,
    ScanSettings: ResolvedScan,
    AblateSettings: ResolvedAblate,
    EditSettings: ResolvedEdit,
    SessionSettings: ResolvedSession,
    TrainSettings: ResolvedTrain,
    ModelSettings: ResolvedModel,
}


@overload
def resolve(settings: GenerateSettings) -> ResolvedGenerate: ...
@overload
def resolve(settings: LayerSettings) -> ResolvedLayer: ...
@overload
def resolve(settings: ScanSettings) -> ResolvedScan: ...
@overload
def resolve(settings: AblateSettings) -> ResolvedAblate: ...
@overload
def resolve(settings: SkipSettings) -> ResolvedSkip: ...
@overload
def resolve(settings: EditSettings) -> ResolvedEdit: ...
@overload
def resolve(settings: TrainSettings) -> ResolvedTrain: ...
@overload
def resolve(settings: SessionSettings) -> ResolvedSession: ...
@overload
def resolve(settings: ModelSettings) -> ResolvedModel: ...
def resolve(settings: ModelSettings) -> ResolvedModel:
    """Fill every None from the model's spec and round the size down to whole tokens.

    Args:
        settings: As the user wrote them. Resolved settings are returned as they are.

    Returns:
        The resolved settings of the same demo, or the model's part of them for settings of another kind.

    Raises:
        InputError: The model is unknown, the settings name layers that it does not have or images that
            cannot steer it, or the size is beyond all image files that this package would read.
    """
    spec = get_spec(settings.model)
    given = {
        name: getattr(settings, name) for name in ("width", "height", "num_steps", "true_cfg", "watermark")
    }
    given["guidance"] = settings.own_guidance
    usual = {
        "width": spec.size,
        "height": spec.size,
        "num_steps": spec.num_steps,
        "true_cfg": spec.true_cfg,
        "watermark": spec.watermark,
        "guidance": spec.guidance,
    }
    values = {name: usual[name] if value is None else value for name, value in given.items()}
    for side in ("width", "height"):
        values[side] = whole_tokens(values[side], side)
    if values["width"] * values["height"] > MOST_PIXELS:
        got = f"{values['width']}x{values['height']}"
        raise InputError(
            f"Got {got}, expected at most {MOST_PIXELS / 1e6:.0f} million pixels: make it smaller"
        )
    check_layers(settings.named_layers, spec.num_layers)
    if isinstance(settings, ConditionSettings):
        check_conditions(settings, spec, settings.model)
    cls = next(RESOLVED[base] for base in type(settings).__mro__ if base in RESOLVED)
    # Everything else has been validated already.
    return cls.model_construct(**{name: getattr(settings, name) for name in cls.model_fields} | values)


def check_run(settings: ResolvedModel) -> None:
    """Print the warnings about a run and claim its folder. Called once, before the model is loaded.

    Raises:
        InputError: As `check_nothing_lost` and `claim_folder`.
    """
    check_nothing_lost(settings)
    print_warnings(settings, get_spec(settings.model))
    claim_folder(Path(settings.output_dir))


def check_nothing_lost(settings: ResolvedModel) -> None:
    """Check that a run writes over none of the images that it is given, nor over work that can be resumed.

    Raises:
        InputError: It would. A sweep, a training, ... is resumed by its run.json, of which a folder has one.
    """
    demo, folder = getattr(settings, "demo", ""), Path(settings.output_dir).resolve()
    other = _recorded_demo(folder)
    if demo in WRITTEN and other in PROGRAMS and other not in WRITTEN:
        raise InputError(
            f"Got {settings.output_dir}, which holds work of {PROGRAMS[other]}: name another output_dir"
        )
    written = WRITTEN.get(demo, "")
    for path in _given_images(settings):
        place = path.resolve()
        if place.is_relative_to(folder) and re.fullmatch(written, place.relative_to(folder).as_posix()):
            raise InputError(
                f"Got {path}, which this run would write over: name another output_dir, or give the image "
                "another name"
            )


def _recorded_demo(folder: Path) -> str | None:
    """Return the demo that wrote the run.json in a folder, if there is a readable one."""
    try:
        demo = json.loads((folder / "run.json").read_text(encoding="utf-8"))["demo"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return demo if isinstance(demo, str) else None


WRITTEN = {
    "test": r"\d{3,}\.png|grid\.png",
    "layer": r"(prompt_\d{3,}/)?(step_\d+_(noisy|clean)\.png|(steps|layers|words)\.png|steps\.gif)",
    "edit": r"(reference|edit_\d+|comparison)\.png",
}
"""The images that a demo writes, by their paths in its output folder."""


def _given_images(settings: ResolvedModel) -> Iterator[Path]:
    """Yield the image files that the settings name."""
    entries = settings.entries if isinstance(settings, EditSettings) else ()
    named = [
        getattr(settings, name, None)
        for name in ("image", "photo", "mask", "context", "fill", "control", "redux")
    ]
    for value in (*named, *(entry.mask for entry in entries)):
        yield from map(Path, [value] if isinstance(value, str) else value or ())


def whole_tokens(side: int, name: str) -> int:
    """Round a side in pixels down to a multiple of 16; print a notice if that changes it."""
    rounded = side // 16 * 16
    if rounded != side:
        print(f"{name} {side} is rounded down to {rounded}, a multiple of 16")
    return rounded
