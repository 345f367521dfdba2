"""Settings of an evaluation: the fields of its JSON file, and the methods that it compares."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from flux.errors import InputError
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings, Shareable
from flux.settings.edits import EditSettings
from flux.settings.fields import FilePath, Seed, Words
from flux.settings.files import check_settings
from flux.settings.messages import show, unknown_field

# Fields that all methods share.
SHARED = (
    "model", "weights", "ae_weights", "text_encoders", "device", "dtype", "offload", "compile", "width",
    "height", "watermark",
)  # fmt: skip
# What a method may have of the settings of all models; `EditSettings` adds its own.
SAMPLING = ("num_steps", "guidance", "true_cfg", "negative_prompt")
# Fields of an edit that the benchmark says.
OF_BENCHMARK = {"prompt", "edits", "photo", "seed", "caption_model"}
# Other fields of an edit that no method has: those of the model and the run, and those without a use here,
# such as images that steer a run.
FOREIGN_TO_METHODS = {
    *(ModelSettings.model_fields.keys() - set(SAMPLING)),
    *(ConditionSettings.model_fields.keys() - {"mask", "reference_strength", "context_every"}),
    "parallel",
}
# Fields that image-to-image has a use for, the last two with a Kontext model.
IMAGE_TO_IMAGE = {*SAMPLING, "mimic_scale", "mimic_percentile", "reference_strength", "context_every"}
# Fields of a method that no edit has.
OWN_TO_METHODS = ("name", "strength", "context_in")
CONTEXT_IN = ("all", "vital", "others")
MethodFields = dict[str, Any]


class EvaluateSettings(Shareable, frozen=True):
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
    output_dir: FilePath = Field("output/evaluate", description="folder to write to, or to resume")

    @field_validator("methods")
    @classmethod
    def _each_with_a_name(cls, methods: tuple[MethodFields, ...]) -> tuple[MethodFields, ...]:
        known: set[str] = set()
        for fields in methods:
            name = fields.get("name")
            if not isinstance(name, str) or not slug(name):
                raise ValueError(f'expected each to have a "name" with letters or digits, got {show(fields)}')
            if slug(name) in BASELINES:
                raise ValueError(f"got {name!r}, the name of a row that every comparison has: choose another")
            if slug(name) in known:
                raise ValueError(f"got {name!r} twice, or a name like it: expected names of their own")
            known.add(slug(name))
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
    """Turn a name into lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def methods_of(settings: EvaluateSettings) -> list[Method]:
    """Read the methods, in the file's order.

    Raises:
        InputError: A field that no edit has, or a wrong value.
    """
    common: dict[str, Any] = {name: getattr(settings, name) for name in (*SHARED, *SAMPLING)}
    # Settings of an edit need these; the benchmark replaces them.
    placeholders = {"prompt": "the photo", "edits": ["the edit"]}
    if settings.references == "photo":
        placeholders["photo"] = "photo"
    methods = []
    for number, fields in enumerate(settings.methods):
        where = f"methods[{number}]"
        if problem := _wrong_field(fields) or _wrong_image_to_image(fields, settings.references):
            raise InputError(f"{where}: {problem}")
        own = {name: value for name, value in fields.items() if name not in OWN_TO_METHODS}
        edit = check_settings(EditSettings, {**common, **own, **placeholders}, where)
        strength, context_in = fields.get("strength"), fields.get("context_in", "all")
        methods.append(Method(fields["name"], edit, strength, context_in))
    return methods


def _wrong_field(fields: MethodFields) -> str | None:
    """Say which field a method cannot have, or what is wrong with its mask."""
    if given := sorted(OF_BENCHMARK & fields.keys()):
        return f"got {', '.join(given)}, which the benchmark says for each edit: leave it out"
    if foreign := sorted(FOREIGN_TO_METHODS & fields.keys()):
        return f"got {', '.join(foreign)}, which all methods share: leave it out, or move it out of methods"
    known = [name for name in EditSettings.model_fields if name not in FOREIGN_TO_METHODS | OF_BENCHMARK]
    if unknown := next((name for name in fields if name not in (*known, *OWN_TO_METHODS)), None):
        return unknown_field(unknown, [*OWN_TO_METHODS, *known])
    if fields.get("mask") not in (None, "given", "auto", "none"):
        return f'mask: expected "given", "auto" or "none", got {show(fields["mask"])}'
    return None


def _wrong_image_to_image(fields: MethodFields, references: str) -> str | None:
    """Say what is wrong with the fields of image-to-image."""
    strength, context_in = fields.get("strength"), fields.get("context_in", "all")
    if context_in not in CONTEXT_IN or (context_in != "all" and strength is None):
        return f'context_in: expected "all", "vital" or "others", and a strength, got {show(context_in)}'
    if strength is None:
        return None
    if type(strength) not in (int, float) or not 0 < strength <= 1:
        return f"strength: expected a number above 0, at most 1, got {show(strength)}"
    if references != "photo":
        return (
            f'strength: image-to-image edits photos, but references is "{references}": leave one of them out'
        )
    useful = {*OWN_TO_METHODS, *IMAGE_TO_IMAGE, *(["vital_layers"] if context_in != "all" else [])}
    if useless := sorted(fields.keys() - useful):
        return f"got {', '.join(useless)} with strength: image-to-image has no use for that"
    return None
