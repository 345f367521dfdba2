"""What each demo's JSON file may say.

None in a field means "as the model's spec says" and is filled in later: no model is known here, hence no
highest layer.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from flux.settings.doses import DEFAULT_DOSE, DOSES
from flux.settings.fields import (
    LIST,
    Fraction,
    Metrics,
    Numbers,
    Offload,
    Seed,
    StrictModel,
    String,
    Sweep,
    Text,
    VitalLayers,
    Weight,
    Words,
)

# ---- kinds of values


# ---- the settings of each demo


class Prompt(StrictModel):
    """One image to be made: what it shows, and the seed of its noise."""

    prompt: String = Field(description="what the image shows")
    seed: Seed = Field(description="seed of the noise")


Prompts = Annotated[tuple[Prompt, ...], LIST]


class Settings(StrictModel):
    """What all settings share: the demo they belong to, and fields of which exactly one is to be given."""

    demo: ClassVar[str]
    either: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _exactly_one(self) -> "Settings":
        given = [name for name in self.either if getattr(self, name) not in (None, ())]
        if self.either and len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"expected exactly one of {', '.join(self.either)}, got {got}")
        return self

    def to_json(self) -> dict[str, Any]:
        """What `read_settings` reads back to equal settings, in JSON's types."""
        return self.model_dump(mode="json")


class Lora(StrictModel):
    """A difference to add to the model."""

    file: Text = Field(description="file of the LoRA")
    weight: float = Field(1.0, description="how much of it is added")


def _as_loras(entries: Any) -> Any:
    """A plain name stands for a file at full weight."""
    if not isinstance(entries, list | tuple):
        return entries
    return [{"file": entry} if isinstance(entry, str) else entry for entry in entries]


Loras = Annotated[tuple[Lora, ...], Field(strict=False), BeforeValidator(_as_loras)]


class ModelSettings(Settings):
    """The model, where it runs, and how it samples."""

    model: Text = Field("flux-nano", description="name of the model, one of flux.specs.configs")
    weights: Text | None = Field(None, description="file or folder of the transformer, or of the whole model")
    ae_weights: Text | None = Field(None, description="file or folder of the autoencoder's weights")
    t5_weights: Text | None = Field(None, description="file or folder of the T5 encoder's weights")
    clip_weights: Text | None = Field(None, description="file or folder of the CLIP encoder's weights")
    text_encoders: Text | None = Field(
        None, description="folder that holds text_encoder, text_encoder_2, tokenizer and tokenizer_2"
    )
    lora: Loras = Field((), description='LoRA files to add, each a name or {"file": ..., "weight": 0.8}')
    device: Text = Field("auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the nets' numbers")
    offload: Offload = Field(
        "none",
        description='what waits in main memory: "none" of the nets, each "model" that is not at work, all '
        'transformer "blocks" but two, or "auto": what free memory asks for',
    )
    quantize: Literal["none", "8bit", "4bit", "fp8"] = Field(
        "none", description="the transformer in fewer bits; only with fp8 it also computes in them"
    )
    t5: Literal["same", "8bit", "cpu"] = Field("same", description="T5 in fewer bits, or on the CPU")
    tiled: bool = Field(False, description="decode in tiles: nearly the same pixels in less memory")
    compile: bool = Field(False, description="compile the transformer's blocks: slower start, faster steps")
    width: int | None = Field(None, ge=16, description="width of the images in pixels")
    height: int | None = Field(None, ge=16, description="height of the images in pixels")
    num_steps: int | None = Field(None, ge=1, description="number of denoising steps")
    guidance: float | None = Field(None, ge=0, description="distilled guidance, a number fed to the model")
    true_cfg: float | None = Field(None, ge=1, description="two-pass guidance; 1 means off")
    negative_prompt: String = Field("", description="what two-pass guidance leads away from")
    batch_size: int = Field(1, ge=1, description="images sampled at once")
    watermark: bool | None = Field(None, description="put the invisible watermark into the images")
    metadata: bool = Field(True, description="write prompt, seed and settings into the image files")
    output_dir: Text = Field("output", description="folder to write to")

    def sampling(self) -> dict[str, Any]:
        """What a pipeline wants to know of how to make a picture, by the names of its arguments."""
        names = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt", "watermark")
        return {name: getattr(self, name) for name in names}


class PromptSettings(ModelSettings):
    """A model and the prompts to run it on; a prompt without seed gets `seed` plus its place in the list."""

    seed: Seed = Field(0, description="seed of the first prompt; each later one's is one higher")
    prompts: Prompts = Field(description="list of prompts, each with or without its seed, or a file of them")

    @field_validator("prompts", mode="before")
    @classmethod
    def _number(cls, prompts: Any, info: ValidationInfo) -> Any:
        if not isinstance(prompts, list | tuple):
            return prompts
        numbered = []
        # `seed` is not there if it is itself wrong, which is reported anyway.
        for seed, entry in enumerate(prompts, start=info.data.get("seed", 0)):
            if isinstance(entry, str):
                entry = {"prompt": entry}
            numbered.append({"seed": seed, **entry} if isinstance(entry, dict) else entry)
        return numbered


class Divisible(ModelSettings):
    """Work of which each picture can be shared out."""

    parallel: int = Field(
        1, ge=1, description="cards that share each picture, one for each process that torchrun started"
    )


class TestSettings(Divisible, PromptSettings):
    """Demo 0: one image per prompt."""

    demo: ClassVar[str] = "test"
    image: Text | None = Field(None, description="start from this picture: image-to-image")
    strength: float = Field(0.8, gt=0, le=1, description="how much of the schedule then runs")
    cache: float | None = Field(
        None, gt=0, description="spare steps at which the first layer changes by less than this, 0.08 for one"
    )
    output_dir: Text = Field("output/test", description="folder to write to")


class LayerSettings(Divisible, PromptSettings):
    """Demo 1: a prompt's way from noise to image. Once read, `prompt` is None and stands in `prompts`."""

    demo: ClassVar[str] = "layer"
    either: ClassVar[tuple[str, ...]] = ("prompt", "prompts")
    prompt: String | None = Field(None, description="the one prompt to follow")
    prompts: Prompts = Field((), description="instead of prompt: several, as a list or a file")
    layers: Numbers = Field((), description="layers whose attention is shown")
    at_steps: Numbers = Field((), description="steps to show it at; none: first, middle and last")
    words: Words = Field((), description="words of the prompt to show it of; none: all of them")
    output_dir: Text = Field("output/layer", description="folder to write to")

    @model_validator(mode="after")
    def _move_prompt(self) -> "LayerSettings":
        if self.prompt is not None:
            self.__dict__.update(prompt=None, prompts=(Prompt(prompt=self.prompt, seed=self.seed),))
        return self


class SkipSettings(PromptSettings):
    """Demo 2: the same images with layers bypassed, a list one by one, a list of lists in sets."""

    demo: ClassVar[str] = "skip"
    layers: Sweep = Field("all", description='what to bypass: "all" one by one, a list, or a list of sets')
    scale: float = Field(0.0, ge=0, lt=1, description="what is left of a bypassed layer's output")
    seeds: int = Field(1, ge=1, description="images of each prompt, each with a seed one higher")
    workers: int = Field(1, ge=1, description="processes that share the work through Ray, one on each GPU")
    ray_address: Text | None = Field(None, description='a Ray cluster: "auto", or its head\'s address')
    output_dir: Text = Field("output/skip", description="folder to write to, or to go on with")

    @property
    def entries(self) -> tuple[Prompt, ...]:
        """The references: each prompt with each of its seeds, in the order of their folders."""
        extras = range(self.seeds)
        return tuple(Prompt(prompt=p.prompt, seed=p.seed + extra) for p in self.prompts for extra in extras)


class SelectionSettings(Settings):
    """How layers are scored, and which of them count as vital."""

    either: ClassVar[tuple[str, ...]] = ("top", "threshold", "gap")
    metrics: Metrics = Field(("dino",), description="how images are compared; the first tells what is vital")
    top: int | None = Field(None, ge=1, description="vital are this many layers, the most vital ones")
    threshold: float | None = Field(None, ge=0, le=2, description="vital are layers of this vitality or more")
    gap: Literal[True] | None = Field(None, description="vital are the layers above the largest gap")


class DinoSettings(SelectionSettings):
    """Demo 3: how much each bypassed layer matters, and which ones are vital."""

    demo: ClassVar[str] = "dino"
    input_dir: Text = Field(description="folder that demo 2 wrote")
    output_dir: Text | None = Field(None, description="folder to write to; None means input_dir")
    model: Text = Field("flux-nano", description="the DINOv2: that of a model of ours, a hub id or a folder")
    device: Text = Field("auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')


class ScanSettings(SkipSettings, SelectionSettings):
    """Demos 2 and 3 in a row: bypass, score, report."""

    demo: ClassVar[str] = "scan"
    encoder: Text | None = Field(None, description="the DINOv2: a hub id or a folder; None: the model's own")
    stop_when: Literal["never", "stable"] = Field(
        "never", description="stable: once the vital set is settled"
    )
    output_dir: Text = Field("output/scan", description="folder to write to, or to go on with")


class Dosage(StrictModel):
    """How much of the reference an edit takes over, and where. None: as the named dose says."""

    dose: Literal[tuple(DOSES)] | None = Field(
        None, description="named choice, used for those of the next five, and the mask, that are not given"
    )
    weight: Weight | None = Field(
        None, description="what the reference counts, 0..1, in all vital layers or in each: {layer: weight}"
    )
    inject_from: Fraction | None = Field(None, description="fraction of the steps where injection starts")
    inject_until: Fraction | None = Field(None, description="fraction of the steps where injection ends")
    falling: bool | None = Field(None, description="the weight falls to zero over these steps")
    top: int | None = Field(None, ge=1, description="only so many of the vital layers, the most vital ones")
    parts: Literal["kv", "k", "v"] | None = Field(None, description="keys, values or both are taken over")
    mask: Text | None = Field(None, description='picture, white where the edit may change; "auto"; "none"')

    @model_validator(mode="after")
    def _window(self):
        start, stop = self.inject_from, self.inject_until
        if start is not None and stop is not None and start >= stop:
            got = f"got inject_from {start:g} and inject_until {stop:g}"
            raise ValueError(f"{got}, expected inject_from to be smaller")
        return self


class Turn(Dosage):
    """One edit. What is None is as in the turn before it, or as the settings of all edits say."""

    prompt: Text = Field(description="what the edited image shows")
    guidance: float | None = Field(None, ge=0, description="distilled guidance of this edit")


def _either(tag: str, model: type[Turn]) -> Any:
    """A prompt alone, or one with numbers of its own."""
    form = Discriminator(lambda entry: tag if isinstance(entry, dict | Turn) else "text")
    return Annotated[Annotated[Text, Tag("text")] | Annotated[model, Tag(tag)], form]


class Edit(Turn):
    """An edit and its further turns."""

    then: Annotated[tuple[_either("turn", Turn), ...], Field(strict=False)] = Field(
        (), description="further turns, each from the first source's keys and values as well"
    )


class EditSettings(Dosage, Divisible):
    """Demo 4: a reference image, generated or a photograph, and edits that keep what they do not name."""

    demo: ClassVar[str] = "edit"
    prompt: String | None = Field(None, description="what the reference shows, or what is on the photo")
    seed: Seed = Field(0, description="seed of the noise that reference and edits share")
    edits: Annotated[tuple[_either("edit", Edit), ...], LIST] = Field(
        description="list of prompts, one for each edited image, or of prompts with numbers of their own"
    )
    vital_layers: VitalLayers = Field("auto", description='"auto", a list, a vital_layers.json or a preset')
    dose: Literal[tuple(DOSES)] = Field(DEFAULT_DOSE, description=Dosage.model_fields["dose"].description)
    parts: Literal["kv", "k", "v"] = Field("kv", description=Dosage.model_fields["parts"].description)
    photo: Text | None = Field(None, description="image file to edit instead of a generated reference")
    paste_back: bool = Field(False, description="give edits of a photo back in its own full size")
    caption_model: Text | None = Field(
        None, description="hub id or folder of a model that writes the prompt for a photo that has none"
    )
    inversion: Literal["euler", "midpoint", "fireflow", "fixed-point", "none"] = Field(
        "midpoint", description="how a photo becomes noise; none: not at all, it is edited by FlowEdit"
    )
    nudging: float | None = Field(
        None, gt=0, description="factor on a photo's latent before inversion; None: 1.15 for euler, else 1"
    )
    correct_drift: bool = Field(
        True, description="add to each step of a photo's edits what the photo's own step misses of its path"
    )
    as_published: bool = Field(
        False, description="photos as by the method's public code, whose reference lags behind"
    )
    cfg_from: Fraction = Field(0.0, description="fraction of the steps where two-pass guidance starts")
    mimic_scale: float | None = Field(
        None, ge=1, description="bring two-pass guidance down to the range that this scale would have"
    )
    mimic_percentile: float = Field(
        0.995, gt=0, le=1, description="share of values that the mimicked range is to hold"
    )
    output_dir: Text = Field("output/edit", description="folder to write to")

    @model_validator(mode="after")
    def _prompt_given(self) -> "EditSettings":
        if self.prompt is None and not (self.photo and self.caption_model):
            what = type(self).model_fields["prompt"].description
            raise ValueError(f"missing field 'prompt': {what}; for a photo, a caption_model can write it")
        return self

    @property
    def entries(self) -> tuple[Turn, ...]:
        """All edits and their turns in the order of reading, each with what it inherits filled in."""
        found, shared = [], {name: getattr(self, name) for name in _INHERITED}
        for edit in self.edits:
            edit, inherited = Edit(prompt=edit) if isinstance(edit, str) else edit, shared
            for turn in (edit, *edit.then):
                turn = Turn(prompt=turn) if isinstance(turn, str) else turn
                # A dose of its own stands for all the numbers that were given before it.
                passed = {n: value for n, value in inherited.items() if not (turn.dose and n in _DOSED)}
                own = {n: value for n in _INHERITED if (value := getattr(turn, n)) is not None}
                inherited = {**passed, **own}
                found.append(Turn(prompt=turn.prompt, **inherited))
        return tuple(found)


_DOSED = ("weight", "inject_from", "inject_until", "falling", "top")
_INHERITED = (*Dosage.model_fields, "guidance")
