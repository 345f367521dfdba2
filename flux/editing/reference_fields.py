"""Which settings shape a reference: the one definition by which a kept reference is used again, or is not."""

from typing import Any

from flux.settings.resolved import ResolvedEdit
from flux.specs import get_spec

STEERING = {
    "context": ("context_positions", "reference_strength", "context_every"),
    "fill": ("mask", "outpaint", "overlap"),
    "control": ("depth_model",),
    "redux": ("redux_strength", "redux_weights", "siglip"),
}
"""The fields that have an effect beside the image that steers a run, by the field of that image."""


def reference_fields(settings: ResolvedEdit, has_photo: bool) -> dict[str, Any]:
    """Returns the settings that shape the reference, by name.

    With one loaded model, one photograph and one list of layers to keep, references whose fields are equal
    are equal bit for bit: image, path, keys and values. Fields that have no effect here are left out.

    Args:
        settings: The reference and its edits.
        has_photo: Whether the reference is a photograph's, not a generated one.
    """
    names = ["model", "prompt", "photo", "width", "height", "num_steps", "watermark"]
    inversion_free = has_photo and settings.inversion_free
    if not has_photo:
        names.append("seed")
        if get_spec(settings.model).params.guidance_embed:
            names.append("guidance")
    else:
        names += ["paste_back", "as_published"]
        if not settings.as_published:
            names.append("inversion")
        if settings.inverts:
            names += ["nudging"] if settings.shifts else ["nudging", "correct_drift"]
        elif not inversion_free:
            names.append("seed")
        if settings.prompt is None:
            names.append("caption_model")
    for image, beside in STEERING.items():
        if getattr(settings, image):
            names += [image, *beside]
    shaping = {name: getattr(settings, name) for name in names}
    if settings.sparse and not (inversion_free or (has_photo and settings.replays)):
        shaping["sparse"] = True  # the reference then keeps all layers, if there is room
    if settings.keeps_queries and not inversion_free:
        shaping["parts"] = "q"
    if settings.true_cfg == 1:
        return shaping
    second_pass = ["negative_prompt"]
    if not inversion_free:
        second_pass.append("cfg_from")
    if not has_photo or inversion_free:
        second_pass += ["true_cfg", "mimic_scale"]
        if settings.mimic_scale is not None:
            second_pass.append("mimic_percentile")
    # A photograph's path is unguided: its second pass is only there for its keys and values.
    return shaping | {"true_cfg": True} | {name: getattr(settings, name) for name in second_pass}
