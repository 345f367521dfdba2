"""Settings: what JSON files and the command line may say."""

from flux.settings.demos import (
    DinoSettings,
    Edit,
    EditSettings,
    GenerateSettings,
    LayerSettings,
    ModelSettings,
    Prompt,
    ScanSettings,
    Settings,
    SkipSettings,
    Turn,
)
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
