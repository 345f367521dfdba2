"""The fields of each demo's JSON file.

None in a field means "as the model's spec says". No model is known here, hence no highest layer:
`flux.settings.complete.resolve` fills such fields in and checks the layers.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from flux.settings.conditions import ConditionSettings
from flux.settings.fields import (
    LIST,
    MAX_SEED,
    FilePath,
    Guidance,
    LoraLayers,
    Metrics,
    Numbers,
    Offload,
    Seed,
    Side,
    SkippedLayers,
    Steps,
    Strength,
    StrictModel,
    String,
    Text,
    TrueCfg,
    Words,
)
from flux.settings.workload import Workload


class Prompt(StrictModel, frozen=True):
    """One image to be made: what it shows, and the seed of its noise."""

    prompt: String = Field(description="what the image shows")
    seed: Seed = Field(description="seed of the noise")


Prompts = Annotated[tuple[Prompt, ...], LIST]


class Settings(StrictModel, frozen=True):
    """The base of all settings.

    Attributes:
        demo: The demo's name in run.json.
        program: The program that reads such a file, as typed on the command line.
        either: Fields of which exactly one must be given.
        renamed: Former names of fields, still read from files.
        before: What a run did before there was a field, by field. A run.json without it means this value.
    """

    demo: ClassVar[str]
    program: ClassVar[str]
    either: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[dict[str, str]] = {}
    before: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="after")
    def _exactly_one(self) -> "Settings":
        given = [name for name in self.either if getattr(self, name) not in (None, ())]
        if self.either and len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise ValueError(f"expected exactly one of {', '.join(self.either)}, got {got}")
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the fields in JSON's types; `read_settings` reads them back to equal settings."""
        return self.model_dump(mode="json")


class Lora(StrictModel, frozen=True):
    """A LoRA to add to the model."""

    file: FilePath = Field(description="file of the LoRA")
    weight: float = Field(default=1.0, description="how much of it is added")
    layers: LoraLayers | None = Field(
        default=None,
        description="layers in which it is added, as a list; or factors of the weight, as {layer: factor}, "
        "where other layers have 1; parts outside the layers stay as they are",
    )

    @model_serializer(mode="wrap")
    def _without_all_layers(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the layers if all of them have the LoRA, as files before there was the field do."""
        return {name: value for name, value in write(self).items() if (name, value) != ("layers", None)}


def _as_loras(entries: Any) -> Any:
    """Write a plain name as a file at full weight."""
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list | tuple):
        return entries
    return [{"file": entry} if isinstance(entry, str) else entry for entry in entries]


Loras = Annotated[tuple[Lora, ...], Field(strict=False), BeforeValidator(_as_loras)]


class ModelSettings(Settings, frozen=True):
    """The model, where it runs, and how it samples."""

    model: Text = Field(default="flux-nano", description="name of the model, one of flux.specs.configs")
    weights: FilePath | None = Field(
        default=None, description="file or folder of the transformer, or of the whole model"
    )
    ae_weights: FilePath | None = Field(
        default=None, description="file or folder of the autoencoder's weights"
    )
    t5_weights: FilePath | None = Field(
        default=None, description="file or folder of the T5 encoder's weights"
    )
    clip_weights: FilePath | None = Field(
        default=None, description="file or folder of the CLIP encoder's weights"
    )
    text_encoders: FilePath | None = Field(
        default=None, description="folder that holds text_encoder, text_encoder_2, tokenizer and tokenizer_2"
    )
    lora: Loras = Field(
        default=(),
        description='LoRA files to add, each a name or {"file": ..., "weight": 0.8, "layers": [1, 2]}',
    )
    lora_weights: FilePath | None = Field(
        default=None, description="file of the LoRA that the model itself has, such as flux-dev-canny-lora"
    )
    lora_scale: float | None = Field(default=None, description="strength of the model's own LoRA")
    redux_weights: FilePath | None = Field(default=None, description="file of the Redux adapter")
    device: Text = Field(default="auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="number format of the models"
    )
    offload: Offload = Field(
        default="none",
        description='what waits in main memory: "none" of the models, each "model" that is not in use, all '
        'transformer "blocks" but two, or "auto": as free memory requires',
    )
    quantize: Literal["none", "8bit", "4bit", "fp8"] = Field(
        default="none", description="the transformer in fewer bits; with fp8 it also computes in them"
    )
    t5: Literal["same", "8bit", "cpu"] = Field(
        default="same", description="T5 as the other models, in fewer bits, or on the CPU"
    )
    tiled: bool = Field(default=False, description="decode in tiles: nearly the same pixels in less memory")
    compile: bool = Field(
        default=False, description="compile the transformer's blocks: slower start, faster steps"
    )
    width: Side | None = Field(default=None, description="width of the images in pixels")
    height: Side | None = Field(default=None, description="height of the images in pixels")
    num_steps: Steps | None = Field(default=None, description="number of denoising steps")
    guidance: Guidance | None = Field(
        default=None, description="distilled guidance, a number given to the model"
    )
    true_cfg: TrueCfg | None = Field(
        default=None, description="true CFG: guidance by two passes; 1 means off"
    )
    negative_prompt: String = Field(default="", description="what true CFG leads away from")
    batch_size: int = Field(default=1, ge=1, description="images sampled at once")
    watermark: bool | None = Field(default=None, description="put the invisible watermark into the images")
    metadata: bool = Field(default=True, description="write prompt, seed and settings into the image files")
    output_dir: FilePath = Field(default="output", description="folder to write to")

    @property
    def named_layers(self) -> tuple[int, ...]:
        """All layers that these settings name by number, to be checked against the model."""
        return ()

    @property
    def own_guidance(self) -> float | None:
        """The guidance that these settings imply. If None, the model's own is used."""
        return self.guidance

    def sampling(self) -> dict[str, Any]:
        """Return the fields that `LoadedModel.generate` takes, by the names of its arguments."""
        names = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt", "watermark")
        return {name: getattr(self, name) for name in names}

    def workload(self) -> Workload:
        """Return the demands that decide how much memory the run needs."""
        return Workload(self.batch_size)


class SessionSettings(ConditionSettings, ModelSettings, frozen=True):
    """The settings of `python -m flux`, apart from its prompts."""

    aspect_ratio: Text | None = Field(
        default=None, description="shape of the images, such as 16:9, instead of width and height"
    )
    seed: Seed | None = Field(default=None, description="seed of the first image")
    init_image: FilePath | None = Field(default=None, description="start from this image")
    strength: Strength = Field(default=0.8, description="how much of the schedule then runs")


class PromptSettings(ConditionSettings, ModelSettings, frozen=True):
    """A model and the prompts to run it on. A prompt without a seed gets `seed` plus its number."""

    seed: Seed = Field(default=0, description="seed of the first prompt; each later one's is one higher")
    prompts: Prompts = Field(description="list of prompts, each with or without its seed, or a file of them")

    @field_validator("prompts", mode="before")
    @classmethod
    def _number(cls, prompts: Any, info: ValidationInfo) -> Any:
        if not isinstance(prompts, list | tuple):
            return prompts
        numbered = []
        # `seed` is missing if it is wrong itself, which is reported anyway.
        for seed, entry in enumerate(prompts, start=info.data.get("seed", 0)):
            if isinstance(entry, str):
                entry = {"prompt": entry}
            numbered.append({"seed": seed, **entry} if isinstance(entry, dict) else entry)
        return numbered


class Divisible(ModelSettings, frozen=True):
    """Work in which several GPUs can share each image."""

    parallel: int = Field(
        default=1, ge=1, description="GPUs that share each image, one for each process that torchrun started"
    )


class Shareable(ModelSettings, frozen=True):
    """Work that several processes can share through Ray."""

    workers: int = Field(
        default=1, ge=1, description="processes that share the work through Ray, one on each GPU"
    )
    ray_address: Text | None = Field(
        default=None, description='a Ray cluster: "auto", or its head\'s address'
    )


class GenerateSettings(Divisible, PromptSettings, frozen=True):
    """Demo 0: one image per prompt."""

    demo: ClassVar[str] = "test"
    program: ClassVar[str] = "demo_0_test.py"
    image: FilePath | None = Field(default=None, description="start from this image: image-to-image")
    strength: Strength = Field(default=0.8, description="how much of the schedule then runs")
    cache: float | None = Field(
        default=None,
        gt=0,
        description="spare steps at which the first layer changes by less than this, for example 0.08",
    )
    output_dir: FilePath = Field(default="output/test", description="folder to write to")

    @model_validator(mode="after")
    def _spares_in_one_way(self) -> "GenerateSettings":
        if self.cache is not None and self.context and self.context_every > 1:
            raise ValueError(
                f"got cache {self.cache:g} and context_every {self.context_every}, which both spare parts of "
                "a step: leave one of them out"
            )
        return self


class LayerSettings(Divisible, PromptSettings, frozen=True):
    """Demo 1: a prompt's way from noise to image. After reading, `prompt` has moved to `prompts`."""

    demo: ClassVar[str] = "layer"
    program: ClassVar[str] = "demo_1_layer.py"
    either: ClassVar[tuple[str, ...]] = ("prompt", "prompts")
    prompt: String | None = Field(default=None, description="the one prompt to follow")
    prompts: Prompts = Field(default=(), description="instead of prompt: several, as a list or a file")
    layers: Numbers = Field(default=(), description="layers whose attention is shown")
    at_steps: Numbers = Field(
        default=(), description="steps to show it at; if none, the first, the middle and the last"
    )
    words: Words = Field(default=(), description="words of the prompt to show it for; if none, all of them")
    output_dir: FilePath = Field(default="output/layer", description="folder to write to")

    @model_validator(mode="after")
    def _move_prompt(self) -> "LayerSettings":
        if self.prompt is not None:
            prompts = (Prompt(prompt=self.prompt, seed=self.seed),)
            # Past the lock of a frozen model. Moved before validation, its errors would name `prompts`.
            object.__setattr__(self, "prompts", prompts)
            object.__setattr__(self, "prompt", None)
        return self


class SkipSettings(Shareable, PromptSettings, frozen=True):
    """Demo 2: the same images with layers skipped: a list one by one, a list of lists in sets."""

    demo: ClassVar[str] = "skip"
    program: ClassVar[str] = "demo_2_skip.py"
    layers: SkippedLayers = Field(
        default="all", description='what to skip: "all" one by one, a list, or a list of sets'
    )
    scale: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of a skipped layer's output that is kept"
    )
    seeds: int = Field(default=1, ge=1, description="images of each prompt, each with a seed one higher")
    output_dir: FilePath = Field(default="output/skip", description="folder to write to, or to resume in")

    @model_validator(mode="after")
    def _seeds_in_range(self) -> "SkipSettings":
        highest = max(entry.seed for entry in self.prompts) + self.seeds - 1
        if highest > MAX_SEED:
            raise ValueError(
                f"got seeds {self.seeds}, which lead to seed {highest}, expected at most {MAX_SEED}"
            )
        return self

    @property
    def named_layers(self) -> tuple[int, ...]:
        """All layers to skip, of every set."""
        if isinstance(self.layers, str):
            return ()
        sets = ((entry,) if isinstance(entry, int) else entry for entry in self.layers)
        return tuple(layer for each in sets for layer in each)

    @property
    def entries(self) -> tuple[Prompt, ...]:
        """The references: each prompt with each of its seeds, in the order of their folders."""
        extras = range(self.seeds)
        return tuple(Prompt(prompt=p.prompt, seed=p.seed + extra) for p in self.prompts for extra in extras)

    def workload(self) -> Workload:
        """Return the demands of a sweep, which keeps streams and decodes images during the next ones."""
        return Workload(self.batch_size, keeps_streams=True, decodes_alongside=True)


class SelectionSettings(Settings, frozen=True):
    """How layers are scored, and which of them count as vital."""

    either: ClassVar[tuple[str, ...]] = ("top", "threshold", "gap")
    metrics: Metrics = Field(
        default=("dino",), description="how images are compared; the first decides what is vital"
    )
    top: int | None = Field(default=None, ge=1, description="vital are this many layers, the most vital ones")
    threshold: float | None = Field(
        default=None, ge=0, le=2, description="vital are layers of this vitality or more"
    )
    gap: Literal[True] | None = Field(default=None, description="vital are the layers above the largest gap")


class DinoSettings(SelectionSettings, frozen=True):
    """Demo 3: how much each skipped layer matters, and which ones are vital."""

    demo: ClassVar[str] = "dino"
    program: ClassVar[str] = "demo_3_dino.py"
    input_dir: FilePath = Field(description="folder that demo 2 wrote")
    output_dir: FilePath | None = Field(default=None, description="folder to write to; if None, input_dir")
    model: FilePath = Field(
        default="flux-nano", description="the DINOv2: that of one of our models, a hub id or a folder"
    )
    device: Text = Field(default="auto", description='where to run: "auto", "cpu", "cuda", "cuda:1", "mps"')


class ScanSettings(SkipSettings, SelectionSettings, frozen=True):
    """Demos 2 and 3 in a row: skip, score, report."""

    demo: ClassVar[str] = "scan"
    program: ClassVar[str] = "python -m flux.scan"
    encoder: FilePath | None = Field(
        default=None, description="the DINOv2: a hub id or a folder; if None, the model's own"
    )
    stop_when: Literal["never", "stable"] = Field(
        default="never", description="stable: once the vital set is settled"
    )
    output_dir: FilePath = Field(default="output/scan", description="folder to write to, or to resume in")
