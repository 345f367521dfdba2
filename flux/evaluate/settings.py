"""Settings of an evaluation: the fields of its JSON file, and the methods that it compares."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.settings.edits import EditSettings
from flux.settings.fields import FilePath, Seed, Text, Words
from flux.settings.files import check_settings
from flux.settings.messages import show

# Fields that all methods share.
SHARED = (
    "model", "weights", "ae_weights", "text_encoders", "device", "dtype", "offload", "compile", "width",
    "height", "watermark",
)  # fmt: skip
# What a method may have of the settings of all models; `EditSettings` adds its own.
SAMPLING = ("num_steps", "guidance", "true_cfg", "negative_prompt")
# Fields that a method cannot have: those of the model and the run, those that the benchmark says, and those
# without a use here.
FOREIGN_TO_METHODS = {
    *(ModelSettings.model_fields.keys() - set(SAMPLING)), "prompt", "edits", "photo", "seed", "paste_back",
    "caption_model", "parallel",
}  # fmt: skip
# Fields that image-to-image has a use for, the last two with a Kontext model.
IMAGE_TO_IMAGE = {*SAMPLING, "mimic_scale", "mimic_percentile", "reference_strength", "context_every"}
# Fields of a method that no edit has.
OWN_TO_METHODS = ("name", "strength", "context_in")
CONTEXT_IN = ("all", "vital", "others")
MethodFields = dict[str, Any]


class EvaluateSettings(ModelSettings, frozen=True):
    """Settings of an evaluation. A field such as num_steps is for all methods that do not name their own."""

    demo: ClassVar[str] = "evaluate"
    program: ClassVar[str] = "python -m flux.evaluate"
    benchmark: FilePath = Field(description="folder in PIE-Bench's layout")
    methods: Annotated[tuple[MethodFields, ...], Field(strict=False, min_length=1)] = Field(
        description='list of {"name": ...} with fields of an edit\'s settings, or with "strength": img2img'
    )
    references: Literal["photo", "generated"] = Field(
        "photo", description="edit the benchmark's photographs, or images generated from their prompts"
    )
    reconstruct: bool = Field(False, description="each photo's own prompt instead of the edit's")
    kinds: Words = Field((), description="only edits of these kinds; empty: all kinds")
    count: int | None = Field(
        None, ge=1, description="only so many edits, the kinds in their original proportions"
    )
    seed: Seed = Field(0, description="added to the seed of each edit")
    metrics: Annotated[tuple[Literal["structure", "lpips", "clip"], ...], Field(strict=False)] = Field(
        ("structure",), description="measures that need a model"
    )
    encoder: FilePath | None = Field(
        None, description="DINO of structure: hub id or folder; by default the model's own"
    )
    clip: FilePath = Field("openai/clip-vit-large-patch14", description="CLIP: hub id or folder")
    judge: FilePath | None = Field(
        None,
        description="a judge of its own, such as measuring.pt; for python -m training.evaluate_edits",
    )
    batch_size: int = Field(16, ge=1, description="edits made at once")
    workers: int = Field(1, ge=1, description="processes that share the work through Ray, one per GPU")
    ray_address: Text | None = Field(None, description='a Ray cluster: "auto", or its head\'s address')
    output_dir: FilePath = Field("output/evaluate", description="folder to write to, or to resume")

    @field_validator("methods")
    @classmethod
    def _each_with_a_name(cls, methods: tuple[MethodFields, ...]) -> tuple[MethodFields, ...]:
        for fields in methods:
            name = fields.get("name")
            if not isinstance(name, str) or not slug(name):
                raise ValueError(f'expected each to have a "name", got {fields}')
        slugs = [slug(fields["name"]) for fields in methods]
        for fields in methods:
            if slugs.count(slug(fields["name"])) > 1 or slug(fields["name"]) in BASELINES:
                raise ValueError(f"expected names of their own, got {fields['name']!r}")
        return methods

    @model_validator(mode="after")
    def _methods_are_sound(self) -> "EvaluateSettings":
        methods_of(self)
        if self.reconstruct and (self.references == "generated" or self.judge):
            raise ValueError("got reconstruct with generated references or a judge, expected neither")
        return self


# Every comparison of photographs has these rows: the photograph encoded and decoded by the autoencoder, and
# the finished edit if the benchmark has it.
BASELINES = ("autoencoder", "truth")


@dataclass(frozen=True, eq=False)
class Method:
    """One way to edit.

    Attributes:
        name: The name in the file. `slug` names its folder.
        settings: The settings of the edit without its prompts and image. The mask "given" is the benchmark's.
        strength: The strength of image-to-image, at 1 from noise alone. If None, the method is another one.
        context_in: The layers in which image-to-image with a Kontext model attends to the photograph: "all",
            the "vital" ones, or the "others".
    """

    name: str
    settings: EditSettings
    strength: float | None = None
    context_in: str = "all"

    @property
    def slug(self) -> str:
        """The name as a folder's."""
        return slug(self.name)


def slug(name: str) -> str:
    """Turns a name into lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def methods_of(settings: EvaluateSettings) -> list[Method]:
    """Reads the methods, in the file's order.

    Raises:
        InputError: a field that no edit has, or a wrong value.
    """
    shared = {name: getattr(settings, name) for name in (*SHARED, *SAMPLING)}
    # Settings of an edit need these; the benchmark replaces them.
    placeholders = {"prompt": "the photo", "edits": ["the edit"]}
    if settings.references == "photo":
        placeholders["photo"] = "photo"
    methods = []
    for number, fields in enumerate(settings.methods):
        own = {name: value for name, value in fields.items() if name not in OWN_TO_METHODS}
        where, strength = f"methods[{number}]", fields.get("strength")
        context_in = fields.get("context_in", "all")
        if foreign := sorted(FOREIGN_TO_METHODS & own.keys()):
            raise InputError(f"{where}: got {', '.join(foreign)}, which all methods share or the edits say")
        if strength is not None and (
            settings.references != "photo" or type(strength) not in (int, float) or not 0 < strength <= 1
        ):
            raise InputError(f"{where}: expected a strength in 0..1, and photos, got {strength!r}")
        if context_in not in CONTEXT_IN or (context_in != "all" and strength is None):
            raise InputError(
                f'{where}: context_in: expected "all", "vital" or "others", and a strength, got '
                f"{show(context_in)}"
            )
        of_layers = {"vital_layers"} if context_in != "all" else set()
        if strength is not None and (useless := sorted(own.keys() - IMAGE_TO_IMAGE - of_layers)):
            raise InputError(
                f"{where}: got {', '.join(useless)} with strength: image-to-image has no use for that"
            )
        if own.get("mask") not in (None, "given", "auto", "none"):
            raise InputError(f'{where}: mask: expected "given", "auto" or "none", got {show(own["mask"])}')
        edit = check_settings(EditSettings, {**shared, **own, **placeholders}, where)
        methods.append(Method(fields["name"], edit, strength, context_in))
    return methods
