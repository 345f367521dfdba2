"""Studios of tiny random models that images steer."""

from pathlib import Path

from flux.loaded_model import LoadedModel
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import configs
from flux.studio.engine import Engine
from flux.studio.limits import Limits
from flux.studio.sessions import Sessions
from flux.studio.state import Studio
from helpers.condition_models import save_steered


def make_steered_studio(name: str, folder: Path, **fields) -> Studio:
    """A studio of one of `helpers.condition_models.SPECS`, which must be in the table of models."""
    weights = str(save_steered(name, folder))
    settings = resolve(ModelSettings(model=name, device="cpu", dtype="float32", weights=weights, **fields))
    limits = Limits.of(configs[name])
    return Studio(Engine(settings, LoadedModel.load(settings)), limits, Sessions(folder / "visits"), folder)
