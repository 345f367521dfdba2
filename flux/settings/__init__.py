"""What JSON files and the command line may say."""

from flux.settings.demos import (
    DinoSettings,
    Edit,
    EditSettings,
    LayerSettings,
    ModelSettings,
    Prompt,
    ScanSettings,
    Settings,
    SkipSettings,
    TestSettings,
    Turn,
)
from flux.settings.files import read_settings

__all__ = [
    "DinoSettings",
    "Edit",
    "EditSettings",
    "LayerSettings",
    "ModelSettings",
    "Prompt",
    "ScanSettings",
    "Settings",
    "SkipSettings",
    "TestSettings",
    "Turn",
    "read_settings",
]
