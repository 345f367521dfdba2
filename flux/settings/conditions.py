"""Conditions: the images that steer a run, by the kinds that models were trained with."""

from typing import Any, Literal

from pydantic import Field

from flux.settings.fields import Borders, FilePath, Files, Fraction, Steps, StrictModel


class ConditionSettings(StrictModel, frozen=True):
    """The images that steer a run, for models that were trained with such images."""

    context: Files = Field(
        default=(), description="Kontext: the image that the prompt is an instruction for, or several"
    )
    context_positions: Literal["index", "offset"] = Field(
        default="index",
        description="how several context images are told apart: by an index of their own, or by places "
        "beside one another",
    )
    reference_strength: float = Field(
        default=1.0,
        ge=0,
        description="how clearly attention tells places of the context apart: scale of its keys about their "
        "mean",
    )
    context_every: Steps = Field(
        default=1,
        description="number of steps that share one computation of the context's keys and values: above 1, "
        "steps are faster, and images change",
    )
    fill: FilePath | None = Field(default=None, description="Fill: the image of which a part is painted anew")
    mask: FilePath | None = Field(
        default=None, description="image of the size of fill, white where it is painted anew"
    )
    outpaint: Borders | None = Field(
        default=None,
        description="instead of mask: borders to paint around fill, as fractions of its sides: one for all, "
        "or left, right, above, below",
    )
    overlap: Fraction = Field(
        default=0.01,
        description="how far the mask of outpaint reaches into fill, as a fraction of its sides",
    )
    paste_back: bool = Field(default=True, description="keep the pixels of fill outside the mask exactly")
    control: FilePath | None = Field(
        default=None, description="Canny and Depth: the image whose edges or depth the images have"
    )
    depth_model: FilePath = Field(
        default="LiheYoung/depth-anything-large-hf", description="hub id or folder of the model of depth"
    )
    redux: Files = Field(default=(), description="Redux: the image to vary, or several to mix")
    redux_strength: float = Field(
        default=1.0, ge=0, description="factor of Redux's tokens: below 1, the prompt counts for more"
    )
    siglip: FilePath = Field(
        default="google/siglip-so400m-patch14-384", description="hub id or folder of the SigLIP of Redux"
    )

    @property
    def pastes_unmasked(self) -> bool:
        """Whether pixels outside the mask of fill are kept exactly."""
        return self.paste_back

    def named_conditions(self) -> dict[str, Any]:
        """Return the images that steer the run, by the fields that name them."""
        names = ("context", "fill", "mask", "outpaint", "control", "redux")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, ())}
