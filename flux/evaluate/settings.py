"""What an evaluation's JSON file may say, and the methods it compares."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from flux.errors import InputError
from flux.settings.demos import EditSettings, ModelSettings
from flux.settings.fields import Seed, Text, Words
from flux.settings.files import check_settings

# Of a method: what the benchmark says, what all methods share, and what an evaluation has no use for.
SHARED = (
    "model", "weights", "ae_weights", "text_encoders", "device", "dtype", "offload", "compile", "width",
    "height", "watermark",
)  # fmt: skip
NOT_OF_A_METHOD = {
    *SHARED, "prompt", "edits", "photo", "seed", "paste_back", "caption_model", "batch_size", "metadata",
    "output_dir",
}  # fmt: skip
Fields = dict[str, Any]


class EvaluateSettings(ModelSettings):
    """Methods compared on a benchmark. A number such as num_steps is every method's that names none."""

    demo: ClassVar[str] = "evaluate"
    benchmark: Text = Field(description="folder in PIE-Bench's layout")
    methods: Annotated[tuple[Fields, ...], Field(strict=False, min_length=1)] = Field(
        description='list of {"name": ...} with fields of an edit\'s settings, or with "strength": img2img'
    )
    references: Literal["photo", "generated"] = Field(
        "photo", description="edit the benchmark's photographs, or pictures generated from their prompts"
    )
    reconstruct: bool = Field(False, description="each photo's own prompt instead of the edit's")
    kinds: Words = Field((), description="only edits of these kinds; none: of all")
    count: int | None = Field(None, ge=1, description="only so many edits, of each kind its share")
    seed: Seed = Field(0, description="added to the seed of each edit")
    metrics: Annotated[tuple[Literal["structure", "lpips", "clip"], ...], Field(strict=False)] = Field(
        ("structure",), description="what is measured with nets"
    )
    encoder: Text | None = Field(None, description="DINO of structure: hub id, folder; None: the model's own")
    clip: Text = Field("openai/clip-vit-large-patch14", description="the CLIP: a hub id or a folder")
    judge: Text | None = Field(None, description="measuring.pt of training/, which tells what succeeded")
    batch_size: int = Field(16, ge=1, description="edits made at once")
    workers: int = Field(1, ge=1, description="processes that share the work through Ray, one on each GPU")
    ray_address: Text | None = Field(None, description='a Ray cluster: "auto", or its head\'s address')
    output_dir: Text = Field("output/evaluate", description="folder to write to, or to go on with")

    @field_validator("methods")
    @classmethod
    def _each_with_a_name(cls, methods: tuple[Fields, ...]) -> tuple[Fields, ...]:
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


# Rows that every comparison of photographs has: what the autoencoder alone makes of the photograph, and the
# finished edit where the benchmark knows it.
BASELINES = ("autoencoder", "truth")


@dataclass(frozen=True, eq=False)
class Method:
    """One way to edit.

    Attributes:
        name: as in the file; slug names its folder.
        settings: of the edit, its prompts and picture left open. Its mask may be "given": the benchmark's.
        strength: of image-to-image, which then is the method; None: it is not.
    """

    name: str
    settings: EditSettings
    strength: float | None = None

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def methods_of(settings: EvaluateSettings) -> list[Method]:
    """The methods, in the file's order. Raises InputError for a field that no edit has, or a wrong value."""
    names = (*SHARED, "num_steps", "guidance", "true_cfg", "negative_prompt")
    shared = {name: getattr(settings, name) for name in names}
    # What stands open must be there, since the settings of an edit want it.
    open_fields = {"prompt": "the photo", "edits": ["the edit"]}
    if settings.references == "photo":
        open_fields["photo"] = "photo"
    methods = []
    for number, fields in enumerate(settings.methods):
        own = {name: value for name, value in fields.items() if name not in ("name", "strength")}
        where, strength = f"methods[{number}]", fields.get("strength")
        if foreign := sorted(NOT_OF_A_METHOD & own.keys()):
            raise InputError(f"{where}: got {', '.join(foreign)}, which all methods share or the edits say")
        if strength is not None and (
            settings.references != "photo" or type(strength) not in (int, float) or not 0 < strength <= 1
        ):
            raise InputError(f"{where}: expected a strength in 0..1, and photos, got {strength!r}")
        edit = check_settings(EditSettings, {**shared, **own, **open_fields}, where)
        methods.append(Method(fields["name"], edit, strength))
    return methods
