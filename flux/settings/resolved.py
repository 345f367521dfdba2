"""Settings that run: what may be None in `flux.settings.demos` has a value here.

`flux.settings.complete.resolve` makes them. Each one can stand wherever the settings that it was made of can.
"""

from flux.settings.ablate import AblateSettings
from flux.settings.demos import (
    GenerateSettings,
    LayerSettings,
    ModelSettings,
    ScanSettings,
    SessionSettings,
    SkipSettings,
)
from flux.settings.edits import EditSettings
from flux.settings.fields import FilePath, Guidance, Side, Steps, StrictModel, TrueCfg
from flux.settings.train import TrainSettings


class FilledIn(StrictModel, frozen=True):
    """The fields that are never None once settings are resolved. `width` and `height` are multiples of 16."""

    width: Side
    height: Side
    num_steps: Steps
    guidance: Guidance
    true_cfg: TrueCfg
    watermark: bool
    output_dir: FilePath


class ResolvedModel(FilledIn, ModelSettings, frozen=True):
    """A model's settings with the numbers of its spec filled in."""


class ResolvedSession(ResolvedModel, SessionSettings, frozen=True):
    """The settings that `python -m flux` runs with."""


class ResolvedGenerate(ResolvedModel, GenerateSettings, frozen=True):
    """The settings that demo 0 runs with."""


class ResolvedLayer(ResolvedModel, LayerSettings, frozen=True):
    """The settings that demo 1 runs with."""


class ResolvedSkip(ResolvedModel, SkipSettings, frozen=True):
    """The settings that demo 2 runs with."""


class ResolvedScan(ResolvedSkip, ScanSettings, frozen=True):
    """The settings that a scan runs with."""


class ResolvedAblate(ResolvedSkip, AblateSettings, frozen=True):
    """The settings that an ablation runs with."""


class ResolvedEdit(ResolvedModel, EditSettings, frozen=True):
    """The settings that demo 4 runs with."""


class ResolvedTrain(ResolvedModel, TrainSettings, frozen=True):
    """The settings that a training runs with."""


SteeredSettings = ResolvedSession | ResolvedGenerate | ResolvedLayer | ResolvedSkip | ResolvedEdit
"""The settings of runs that images can steer."""
