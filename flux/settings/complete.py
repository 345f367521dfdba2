"""Settings with every None filled in from the spec of their model."""

from typing import TypeVar

from flux.intervention import check_layers
from flux.settings.demos import ModelSettings, SkipSettings
from flux.specs import get_spec

PUBLISHED_GUIDANCE = 3.0
"""Of the edits of a photograph in Stable Flow's public code."""


Settings = TypeVar("Settings", bound=ModelSettings)


def complete(settings: Settings) -> Settings:
    """The settings with every None filled from the model's spec and the size brought to whole tokens.

    Raises:
        InputError: an unknown model, or layers that it does not have.
    """
    spec = get_spec(settings.model)
    published = getattr(settings, "as_published", False) and settings.photo
    filled = {
        "width": spec.size,
        "height": spec.size,
        "num_steps": spec.num_steps,
        "guidance": PUBLISHED_GUIDANCE if published else spec.guidance,
        "true_cfg": spec.true_cfg,
        "watermark": spec.watermark,
    }
    filled.update({name: value for name in filled if (value := getattr(settings, name)) is not None})
    for side in ("width", "height"):
        filled[side] = whole_tokens(filled[side], side)
    settings = settings.model_copy(update=filled)
    layers = getattr(settings, "layers" if isinstance(settings, SkipSettings) else "vital_layers", ())
    if not isinstance(layers, str):
        for layer in layers:
            check_layers([layer] if isinstance(layer, int) else layer, spec.num_layers)
    return settings


def whole_tokens(side: int, name: str) -> int:
    """The side in pixels, rounded down to a multiple of 16, with a printed notice if that changes it."""
    rounded = side // 16 * 16
    if rounded != side:
        print(f"{name} {side} is rounded down to {rounded}, a multiple of 16")
    return rounded
