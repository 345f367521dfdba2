"""Which settings shape a reference: the one definition by which a kept reference is used again, or is not."""

from typing import Any

from flux.settings.resolved import ResolvedEdit
from flux.specs import get_spec

ALWAYS = ("model", "prompt", "photo", "width", "height", "num_steps", "watermark")
STEERING = {
    "context": ("context_positions", "reference_strength", "context_every"),
    "fill": ("mask", "outpaint", "overlap"),
    "control": ("depth_model",),
    "redux": ("redux_strength", "redux_weights", "siglip"),
}
"""The fields that have an effect beside the image that steers a run, by the field of that image."""


def reference_fields(settings: ResolvedEdit, has_photo: bool) -> dict[str, Any]:
    """Return the settings that shape the reference, by name.

    With one loaded model, one photograph and one list of layers to keep, references whose fields are equal
    are equal bit for bit: image, path, keys and values. Fields that have no effect here are left out.

    Args:
        settings: The reference and its edits.
        has_photo: Whether the reference is a photograph's, not a generated one.
    """
    names = [*ALWAYS, *(_of_photo(settings) if has_photo else _of_generated(settings))]
    for image, beside in STEERING.items():
        if getattr(settings, image):
            names += [image, *beside]
    fields = {name: getattr(settings, name) for name in names}
    keeps_nothing = has_photo and settings.inversion_free  # FlowEdit injects nothing
    if settings.sparse and not keeps_nothing and not (has_photo and settings.replays):
        fields["sparse"] = True  # the reference then keeps all layers, if there is room
    if settings.keeps_queries and not keeps_nothing:
        fields["parts"] = "q"
    if settings.true_cfg != 1:
        fields |= _of_second_pass(settings, has_photo)
    return fields


def _of_generated(settings: ResolvedEdit) -> list[str]:
    """List the fields that shape a generated reference alone."""
    return ["seed", "guidance"] if get_spec(settings.model).params.guidance_embed else ["seed"]


def _of_photo(settings: ResolvedEdit) -> list[str]:
    """List the fields that shape a photograph's reference alone."""
    names = ["paste_back", "as_published"]
    if not settings.as_published:
        names.append("inversion")
    if settings.inverts:
        names += ["nudging"] if settings.shifts else ["nudging", "correct_drift"]
    elif not settings.inversion_free:
        names.append("seed")  # of the noise that is added
    if settings.prompt is None:
        names.append("caption_model")
    return names


def _of_second_pass(settings: ResolvedEdit, has_photo: bool) -> dict[str, Any]:
    """Return the fields of true CFG that shape the reference.

    A photograph's path is unguided. Its second pass is only there for its keys and values, so that the scales
    do not count. With FlowEdit they count, since its reference steers the source's velocity.
    """
    names = ["negative_prompt"]
    if not (has_photo and settings.inversion_free):
        names.append("cfg_from")
    if not has_photo or settings.inversion_free:
        names += ["true_cfg", "mimic_scale"]
        if settings.mimic_scale is not None:
            names.append("mimic_percentile")
    return {"true_cfg": True} | {name: getattr(settings, name) for name in names}
