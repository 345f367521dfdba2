"""The fields of a JSON file that ablates a LoRA."""

from typing import ClassVar

from pydantic import Field, model_validator

from flux.settings.demos import SelectionSettings, SkipSettings
from flux.settings.fields import FilePath, SkippedLayers


class AblateSettings(SkipSettings, SelectionSettings, frozen=True):
    """Which layers of a LoRA matter: the same images with its update left out in some layers."""

    demo: ClassVar[str] = "ablate"
    program: ClassVar[str] = "python -m flux.lora ablate"
    layers: SkippedLayers = Field(
        default="all",
        description='where the update is left out: "all" of the LoRA\'s layers one by one, a list, or a list '
        "of sets",
    )
    scale: float = Field(default=0.0, ge=0, lt=1, description="fraction of a left-out update that is kept")
    encoder: FilePath | None = Field(
        default=None, description="the DINOv2: a hub id or a folder; if None, the model's own"
    )
    output_dir: FilePath = Field(default="output/ablate", description="folder to write to, or to resume in")

    @model_validator(mode="after")
    def _one_lora(self) -> "AblateSettings":
        if len(self.lora) != 1:
            raise ValueError(f"lora: expected one, whose layers are left out, got {len(self.lora)}")
        return self
