"""Models that come with the package, loaded once for all tests that are about something else."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from flux.loaded_model import LoadedModel
from flux.runtime.parallel import ALONE
from flux.specs import ModelSpec, get_spec

FILES = ("weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "lora", "lora_weights")
CHOICES = ("model", "device", "dtype", "quantize", "t5", "tiled", "lora_scale")


@dataclass
class Kept:
    """A loaded model, and what it was loaded for."""

    choices: list[Any]
    spec: ModelSpec
    model: LoadedModel


def load_once(patch: pytest.MonkeyPatch, kept: list[Kept]) -> None:
    """Hands out a kept model where it would be loaded again. Files of a person's own are always loaded."""
    load = LoadedModel.load

    def load_or_reuse(settings, group=ALONE, opened=None):
        if isinstance(settings, str) or group is not ALONE or not is_usual(settings):
            return load(settings, group, opened)
        choices, spec = [getattr(settings, name, None) for name in CHOICES], get_spec(settings.model)
        found = next((each for each in kept if (each.choices, each.spec) == (choices, spec)), None)
        if found is None:
            found = Kept(choices, spec, load(settings, group, opened))
            kept.append(found)
        return replace(found.model, timings=dict(found.model.timings))

    patch.setattr(LoadedModel, "load", load_or_reuse)


def is_usual(settings) -> bool:
    """Whether the model is of the package's own files, on its device and not compiled."""
    own_files = any(getattr(settings, name, None) for name in FILES)
    is_bundled = settings.model.startswith("flux-nano")
    return is_bundled and not own_files and settings.offload == "none" and not settings.compile
