"""Demo 4: what the JSON file of a reference and its edits may say."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from flux.settings.conditions import ConditionSettings
from flux.settings.demos import Divisible
from flux.settings.doses import DEFAULT_DOSE, DOSES, PUBLISHED_GUIDANCE, Dose, DoseName, InjectedParts
from flux.settings.fields import (
    LIST,
    FilePath,
    Fraction,
    Guidance,
    Seed,
    StrictModel,
    String,
    Text,
    VitalLayers,
    Weight,
)
from flux.settings.workload import Workload


class DoseSettings(StrictModel, frozen=True):
    """How much of the reference an edit injects, and where. If None, as the named dose says."""

    dose: DoseName | None = Field(
        default=None,
        description="named choice, used for those of the next five, and the mask, that are not given",
    )
    weight: Weight | None = Field(
        default=None,
        description="how much the reference counts, 0..1, in all vital layers or in each: {layer: weight}",
    )
    inject_from: Fraction | None = Field(
        default=None, description="fraction of the steps where injection starts"
    )
    inject_until: Fraction | None = Field(
        default=None, description="fraction of the steps where injection ends"
    )
    falling: bool | None = Field(default=None, description="the weight falls to zero over these steps")
    top: int | None = Field(
        default=None, ge=1, description="only so many of the vital layers, the most vital ones"
    )
    parts: InjectedParts | None = Field(
        default=None, description="what is injected: keys, values, queries, or several of them"
    )
    mask: FilePath | None = Field(
        default=None, description='image, white where the edit may change; "auto"; "none"'
    )

    @model_validator(mode="after")
    def _window(self) -> "DoseSettings":
        start, stop = self.inject_from, self.inject_until
        if start is not None and stop is not None and start >= stop:
            got = f"got inject_from {start:g} and inject_until {stop:g}"
            raise ValueError(f"{got}, expected inject_from to be smaller")
        return self


class Turn(DoseSettings, frozen=True):
    """One edit. What is None is as in the turn before it, or as the settings of all edits say."""

    prompt: Text = Field(description="what the edited image shows")
    guidance: Guidance | None = Field(default=None, description="distilled guidance of this edit")

    def effective_dose(self) -> Dose:
        """Return the named dose, with the numbers that this edit gives itself in place of the dose's own."""
        names = (*DOSE_NUMBERS, "mask")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        dose = replace(DOSES[self.dose or DEFAULT_DOSE], **given)
        own = {"hold_subject_until": None, "noised_until": None}
        return replace(dose, **own) if "inject_until" in given else dose


def _prompt_form(entry: Any) -> str:
    return "fields" if isinstance(entry, dict | Turn) else "text"


TurnEntry = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Turn, Tag("fields")], Discriminator(_prompt_form)
]


class Edit(Turn, frozen=True):
    """An edit and its further turns."""

    then: Annotated[tuple[TurnEntry, ...], Field(strict=False)] = Field(
        default=(), description="further turns, each of which injects the first source's kv too"
    )


EditEntry = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Edit, Tag("fields")], Discriminator(_prompt_form)
]


Inversion = Literal[
    "noising", "midpoint", "euler", "fireflow", "fixed-point", "directedit", "none", "decflowedit"
]


class EditSettings(DoseSettings, ConditionSettings, Divisible, frozen=True):
    """Demo 4: a reference image, generated or a photograph, and edits that keep what they do not name."""

    demo: ClassVar[str] = "edit"
    program: ClassVar[str] = "demo_4_edit.py"
    before: ClassVar[dict[str, Any]] = {"sparse": False}
    prompt: String | None = Field(
        default=None, description="what the reference shows, or what is on the photo"
    )
    seed: Seed = Field(default=0, description="seed of the noise that reference and edits share")
    edits: Annotated[tuple[EditEntry, ...], LIST] = Field(
        description="list of prompts, one for each edited image, or of prompts with numbers of their own"
    )
    vital_layers: VitalLayers = Field(
        default="auto", description='"auto", a list, a vital_layers.json or a preset'
    )
    dose: DoseName = Field(default=DEFAULT_DOSE, description=DoseSettings.model_fields["dose"].description)
    parts: InjectedParts = Field(default="kv", description=DoseSettings.model_fields["parts"].description)
    photo: FilePath | None = Field(
        default=None, description="image file to edit instead of a generated reference"
    )
    paste_back: bool = Field(default=False, description="return edits of a photo in the photo's full size")
    caption_model: FilePath | None = Field(
        default=None, description="hub id or folder of a model that writes the prompt for a photo without one"
    )
    inversion: Inversion = Field(
        default="noising",
        description="how a photo becomes noise: it is added in each step, or one of four inversions "
        "finds it; directedit, none and decflowedit edit the photo by DirectEdit, FlowEdit and DecFlowEdit",
    )
    nudging: float | None = Field(
        default=None,
        gt=0,
        description="factor on a photo's latent before inversion; if None, 1.15 for euler, else 1",
    )
    correct_drift: bool = Field(
        default=True,
        description="add to each step of a photo's edits what the photo's own step misses of its path",
    )
    as_published: bool = Field(
        default=False, description="edit photos as the method's public code does, whose reference lags behind"
    )
    cfg_from: Fraction = Field(default=0.0, description="fraction of the steps where true CFG starts")
    mimic_scale: float | None = Field(
        default=None, ge=1, description="bring true CFG down to the range that this scale would have"
    )
    mimic_percentile: float = Field(
        default=0.995, gt=0, le=1, description="share of values that the mimicked range holds"
    )
    sparse: bool = Field(
        default=True, description="compute only the tokens that an edit may change, once they are known"
    )
    output_dir: FilePath = Field(default="output/edit", description="folder to write to")

    @model_validator(mode="after")
    def _prompt_given(self) -> "EditSettings":
        if self.prompt is None and not (self.photo and self.caption_model):
            what = type(self).model_fields["prompt"].description
            raise ValueError(f"missing field 'prompt': {what}; for a photo, a caption_model can write it")
        return self

    @property
    def pastes_unmasked(self) -> bool:
        """Always, since `paste_back` is about a photo here."""
        return True

    @property
    def named_layers(self) -> tuple[int, ...]:
        """The vital layers, if they are listed."""
        return () if isinstance(self.vital_layers, str) else self.vital_layers

    @property
    def inversion_free(self) -> bool:
        """Whether a photograph's edits walk from its latent, by FlowEdit or DecFlowEdit as published."""
        return self.inversion in ("none", "decflowedit") and not self.as_published

    @property
    def inverts(self) -> bool:
        """Whether a photograph's noise is found by an inversion."""
        return self.as_published or self.inversion not in ("noising", "none", "decflowedit")

    @property
    def replays(self) -> bool:
        """Whether a photograph's reference is replayed as it was inverted: its drift is not corrected."""
        return self.as_published or self.shifts or (self.inverts and not self.correct_drift)

    @property
    def shifts(self) -> bool:
        """Whether a photograph's edits take their steps where its inversion took them, by DirectEdit."""
        return self.inversion == "directedit" and not self.as_published

    @property
    def keeps_queries(self) -> bool:
        """Whether a kept reference keeps queries as well, for edits that inject them."""
        return "q" in self.parts

    @property
    def own_guidance(self) -> float | None:
        """The given guidance, or that of the method's public code where it is asked for."""
        if self.guidance is None and self.as_published and self.photo:
            return PUBLISHED_GUIDANCE
        return self.guidance

    @property
    def entries(self) -> tuple[Turn, ...]:
        """All edits and their turns in reading order, each with what it inherits filled in."""
        found = []
        shared = {name: getattr(self, name) for name in INHERITED}
        for edit in self.edits:
            edit, inherited = Edit(prompt=edit) if isinstance(edit, str) else edit, shared
            for turn in (edit, *edit.then):
                turn = Turn(prompt=turn) if isinstance(turn, str) else turn
                # A dose that a turn names itself replaces all numbers that were given before it.
                passed = {n: value for n, value in inherited.items() if not (turn.dose and n in DOSE_NUMBERS)}
                own = {n: value for n in INHERITED if (value := getattr(turn, n)) is not None}
                inherited = {**passed, **own}
                found.append(Turn(prompt=turn.prompt, **inherited))
        return tuple(found)

    def workload(self) -> Workload:
        """Return the demands of edits, for which a reference keeps the kv of its vital layers."""
        masks = {entry.effective_dose().mask for entry in self.entries}
        return Workload(
            self.batch_size,
            interleaved=1 + len(self.entries),
            kept_layers=None if isinstance(self.vital_layers, str) else len(self.vital_layers),
            finds_masks="auto" in masks,
            keeps_queries=any("q" in (entry.parts or "") for entry in self.entries),
            keeps_all_layers=self.sparse and not masks <= {None, "none"},
            encodes=bool(self.photo),
        )


DOSE_NUMBERS = ("weight", "inject_from", "inject_until", "falling", "top")
INHERITED = (*DoseSettings.model_fields, "guidance")
