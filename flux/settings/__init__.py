"""Settings: what JSON files and the command line may say."""

from flux.settings.demos import (
    DinoSettings,
    GenerateSettings,
    LayerSettings,
    ModelSettings,
    Prompt,
    ScanSettings,
    Settings,
    SkipSettings,
)
from flux.settings.edits import Edit, EditSettings, Turn
from flux.settings.files import read_settings
from flux.settings.resolved import (
    ResolvedEdit,
    ResolvedGenerate,
    ResolvedLayer,
    ResolvedModel,
    ResolvedScan,
    ResolvedSkip,
)

__all__ = [
    "DinoSettings",
    "Edit",
    "EditSettings",
    "GenerateSettings",
    "LayerSettings",
    "ModelSettings",
    "Prompt",
    "ResolvedEdit",
    "ResolvedGenerate",
    "ResolvedLayer",
    "ResolvedModel",
    "ResolvedScan",
    "ResolvedSkip",
    "ScanSettings",
    "Settings",
    "SkipSettings",
    "Turn",
    "read_settings",
]
