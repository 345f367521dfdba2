"""Settings that change nothing, or that ask for a size that the model was not made for: lines that warn."""

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from flux.settings.conditions import ConditionSettings
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, ScanSettings, SessionSettings
from flux.settings.doses import PUBLISHED_GUIDANCE
from flux.settings.edits import DOSE_NUMBERS, EditSettings
from flux.settings.fields import StrictModel
from flux.settings.messages import show

if TYPE_CHECKING:
    from flux.specs import ModelSpec

SMALLEST_AREA, LARGEST_AREA = 0.1, 2.0  # of images that a model draws well, as parts of its own size's area
PHOTO_FIELDS = ("paste_back", "as_published", "inversion", "nudging", "correct_drift", "caption_model")


def fields_without_effect(settings: ModelSettings, spec: "ModelSpec") -> list[str]:
    """Return the fields whose values change nothing, each with the reason: "guidance (... has none)".

    Only values other than the default count, since a run.json names every field.

    Args:
        settings: Settings of any demo, resolved or not.
        spec: The spec of their model.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in without_effect(settings, spec):
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]


def settings_warnings(settings: ModelSettings, spec: "ModelSpec") -> list[str]:
    """Return a line for each reason of fields without effect, for an unusual size, and for an idle edit.

    Command lines print them to stderr (`print_warnings`). A page calls this with the settings that it runs
    with, and shows the lines beside its images.
    """
    lines = [f"without effect: {field}" for field in fields_without_effect(settings, spec)]
    width, height = (side or spec.size for side in (settings.width, settings.height))
    if not SMALLEST_AREA <= width * height / spec.size**2 <= LARGEST_AREA:
        lines.append(
            f"{width}x{height} is far from {spec.size}x{spec.size}, the size that {settings.model} was made "
            "for: expect scenes that repeat or fall apart"
        )
    if isinstance(settings, EditSettings) and settings.prompt in {each.prompt for each in settings.entries}:
        lines.append(
            f"{show(settings.prompt)} is the reference's prompt and an edit's, which asks for no change"
        )
    return lines


def print_warnings(settings: ModelSettings, spec: "ModelSpec") -> None:
    """Print the `settings_warnings` to stderr."""
    for line in settings_warnings(settings, spec):
        print(f"warning: {line}", file=sys.stderr)


def without_effect(settings: ModelSettings, spec: "ModelSpec") -> Iterator[tuple[str, str]]:
    """Yield each field without effect, with the reason."""
    if (settings.true_cfg or spec.true_cfg) == 1:
        for name in _changed(settings, "negative_prompt", "cfg_from", "mimic_scale", "mimic_percentile"):
            yield name, "true_cfg is 1"
    elif isinstance(settings, EditSettings):
        if settings.cfg_from == 1:
            yield "true_cfg", "cfg_from is 1"
        for name in _changed(settings, "mimic_percentile") if settings.mimic_scale is None else ():
            yield name, "no mimic_scale"
    if not spec.params.guidance_embed:
        usual = {None, spec.guidance}
        if isinstance(settings, EditSettings) and settings.as_published:
            usual.add(PUBLISHED_GUIDANCE)
        turns = settings.entries if isinstance(settings, EditSettings) else ()
        if not {settings.guidance, *(turn.guidance for turn in turns)} <= usual:
            yield "guidance", f"{settings.model} takes none"
    if spec.lora_filename is None:
        for name in _changed(settings, "lora_weights", "lora_scale"):
            yield name, f"{settings.model} has no LoRA of its own"
    if isinstance(settings, GenerateSettings | SessionSettings):
        field = "image" if isinstance(settings, GenerateSettings) else "init_image"
        if getattr(settings, field) is None:
            for name in _changed(settings, "strength"):
                yield name, f"no {field}"
        elif settings.strength == 1:
            yield field, "strength is 1"
    if isinstance(settings, ConditionSettings):
        yield from _without_effect_on_conditions(settings, spec)
    if isinstance(settings, LayerSettings):
        for name in _changed(settings, "batch_size"):
            yield name, "images are made one by one"
        for name in _changed(settings, "at_steps", "words") if not settings.layers else ():
            yield name, "no layers"
    if isinstance(settings, EditSettings):
        yield from _without_effect_on_edits(settings)
    if isinstance(settings, ScanSettings):
        listed = range(spec.num_layers) if settings.layers == "all" else settings.layers
        count = sum(isinstance(each, int) or len(each) == 1 for each in listed)  # of sets, none is chosen
        if settings.top is not None and settings.top > count:
            yield f"top {settings.top}", f"only {count} layers are skipped alone"


def _without_effect_on_conditions(
    settings: ConditionSettings, spec: "ModelSpec"
) -> Iterator[tuple[str, str]]:
    # Of an edit, paste_back is about a photo.
    pasting = () if isinstance(settings, EditSettings) else ("paste_back",)
    rules = (
        (not settings.context, ("reference_strength", "context_every"), "no context"),
        (len(settings.context) < 2, ("context_positions",), "not several context images"),
        (settings.fill is None, pasting, "no fill"),
        (settings.outpaint is None, ("overlap",), "no outpaint"),
        (spec.control != "depth", ("depth_model",), "no depth is estimated"),
        (not settings.redux, ("redux_strength", "redux_weights", "siglip"), "no redux"),
    )
    for holds, names, reason in rules:
        for name in _changed(settings, *names) if holds else ():
            yield name, reason
    if isinstance(settings, SessionSettings) and settings.aspect_ratio:
        if settings.fill is not None:
            yield "aspect_ratio", "fill has a shape of its own"
        elif settings.width and settings.height:
            yield "aspect_ratio", "width and height are given"


def _without_effect_on_edits(settings: EditSettings) -> Iterator[tuple[str, str]]:
    if settings.photo is None:
        for name in _changed(settings, *PHOTO_FIELDS):
            yield name, "no photo"
    elif settings.as_published:
        if settings.inversion != "euler":
            for name in _changed(settings, "inversion"):
                yield name, "as_published uses euler"
    elif settings.shifts:
        for name in _changed(settings, "correct_drift"):
            yield name, f'inversion is "{settings.inversion}"'
    elif not settings.inverts:
        for name in _changed(settings, "nudging", "correct_drift"):
            yield name, f'inversion is "{settings.inversion}"'
    if settings.photo is not None and settings.prompt is not None:
        for name in _changed(settings, "caption_model"):
            yield name, "there is a prompt"
    if settings.photo is not None and settings.inversion_free:
        # vital_layers are filled in for every run
        for name in _changed(settings, "dose", "parts", *DOSE_NUMBERS):
            yield name, f'inversion "{settings.inversion}" injects nothing'
        for name in _changed(settings, "context_every") if settings.context else ():
            yield name, "FlowEdit computes all of it in every step"
    if isinstance(settings.vital_layers, tuple):
        count = len(settings.vital_layers)
        for top in sorted({entry.top for entry in settings.entries if entry.top and entry.top > count}):
            yield f"top {top}", f"only {count} vital layers"


def _changed(settings: StrictModel, *names: str) -> list[str]:
    """Return the names of the fields that are there and have another value than their default."""
    fields: Mapping = type(settings).model_fields
    return [name for name in names if name in fields and getattr(settings, name) != fields[name].default]
