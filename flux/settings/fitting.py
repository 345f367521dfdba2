"""Whether the images of a run fit its model and one another."""

from collections.abc import Iterator

from flux.errors import InputError
from flux.settings.conditions import ConditionSettings
from flux.specs import ModelSpec, configs

KINDS = {"context": "kontext", "fill": "fill", "control": "control"}
"""The kind of a model, by the field that its images are given in. Redux's go with any model that has an
adapter."""


def check_conditions(settings: ConditionSettings, spec: ModelSpec, name: str) -> None:
    """Raise InputError if the images do not fit the model or one another.

    Args:
        settings: Settings of a run.
        spec: The spec of their model.
        name: The name of the model.
    """
    if problem := next(_problems(settings, spec, name), None):
        raise InputError(problem)


def _problems(settings: ConditionSettings, spec: ModelSpec, name: str) -> Iterator[str]:
    takes = next((field for field, kind in KINDS.items() if kind == spec.condition), None)
    for field, kind in KINDS.items():
        given = getattr(settings, field)
        if given and field != takes:
            others = [each for each, other in configs.items() if other.condition == kind]
            use = f", which takes {takes}" if takes else ", which was trained without such images"
            yield f"Got {field} for {name}{use}: choose {' or '.join(others)}, or leave {field} out"
        # Without context tokens Kontext is a text-to-image model. The others would lack input channels.
        if field == takes and field != "context" and not given:
            _, _, what = (ConditionSettings.model_fields[field].description or "").partition(": ")
            yield f"Got no {field} for {name}, which needs it: give {what}"
    if settings.redux and not (spec.redux_filename or getattr(settings, "redux_weights", None)):
        yield f"Got redux for {name}, which has no Redux adapter: choose flux-dev-redux, or leave redux out"
    yield from _problems_of_mask(settings)


def _problems_of_mask(settings: ConditionSettings) -> Iterator[str]:
    # An edit has masks of its own: without fill they say where it may change.
    masks_edits = "edits" in type(settings).model_fields
    given = [name for name in ("mask", "outpaint") if getattr(settings, name) is not None]
    if settings.fill is None:
        if given and not (masks_edits and given == ["mask"]):
            yield f"Got {' and '.join(given)} without fill: name the image that it belongs to as fill"
    elif len(given) != 1:
        got = " and ".join(given) or "neither mask nor outpaint"
        yield f"Got fill with {got}: give one of them, which says what is painted anew"
    elif settings.mask in ("auto", "none"):
        yield f'Got fill with mask "{settings.mask}": give an image, white where fill is painted anew'
    elif masks_edits and getattr(settings, "photo", None):
        yield "Got fill and photo: give one image, to be filled or to be edited"
