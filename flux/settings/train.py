"""The fields of a JSON file that trains a LoRA."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from flux.settings.demos import ModelSettings
from flux.settings.fields import (
    LIST,
    FilePath,
    Fraction,
    Guidance,
    LayerKey,
    Seed,
    Side,
    Steps,
    Text,
    VitalLayers,
    Words,
    no_repeats,
)
from flux.settings.workload import Workload

TRIGGER = "[trigger]"
"""Stands for the trigger in captions and sample prompts."""

Rank = Annotated[int, Field(ge=1)]
Ranks = Annotated[
    Annotated[Rank, Tag("number")] | Annotated[dict[LayerKey, Rank], Tag("layers")],
    Discriminator(lambda rank: "layers" if isinstance(rank, dict) else "number"),
]
Parts = Annotated[tuple[Literal["attention", "mlp"], ...], LIST, AfterValidator(no_repeats)]
Sizes = Annotated[tuple[Side, ...], LIST, AfterValidator(no_repeats)]


class TrainSettings(ModelSettings, frozen=True):
    """The training of a LoRA. Size, steps, guidance and true CFG are those of its samples."""

    demo: ClassVar[str] = "train"
    program: ClassVar[str] = "python -m flux.lora train"
    images: FilePath = Field(
        description="folder of the training images, each with a .txt of the same name, or with a line in "
        "metadata.jsonl or captions.jsonl; for Kontext, what each was made of is in its subfolder context"
    )
    trigger: Text | None = Field(
        default=None, description="words that call what is learnt; put before captions that lack them"
    )
    layers: VitalLayers = Field(
        default="vital",
        description='layers to train: "vital" (the model\'s vital layers), "all", a list, a '
        "vital_layers.json, or the name of a preset",
    )
    parts: Parts = Field(default=("attention", "mlp"), description="parts of these layers to train")
    rank: Ranks = Field(default=16, description="rank of the LoRA, or one for each layer")
    alpha: float | None = Field(
        default=None, gt=0, description="the update is scaled by alpha / rank; if None, alpha is the rank"
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="learning rate of AdamW")
    steps: Steps = Field(default=1500, description="number of training steps")
    sizes: Sizes | None = Field(
        default=None,
        description="sides of the squares whose areas the training images get, by default "
        "512, 768 and 1024, or the one size of a smaller model or of Kontext; images are never enlarged",
    )
    caption_dropout: Fraction = Field(
        default=0.05, description="how often a caption is replaced by an empty text"
    )
    training_guidance: Guidance = Field(
        default=1.0, description="distilled guidance that the model is given while it trains"
    )
    seed: Seed = Field(default=0, description="seed of the training, and of the first sample")
    save_every: Steps = Field(default=250, description="steps after which the state and a LoRA are saved")
    sample_every: Steps = Field(default=250, description="steps after which samples are made")
    sample_prompts: Words | None = Field(
        default=None,
        description="prompts of the samples, with [trigger] in the trigger's place; if None, the first two "
        "captions; if empty, there are no samples",
    )
    encoder: FilePath | None = Field(
        default=None,
        description="the DINOv2 of the curves: a hub id or a folder; if None, the model's own",
    )
    checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="compute a layer's activations again in the backward pass: less memory, a third more "
        'time; "auto": as free memory requires',
    )
    parallel: int = Field(
        default=1, ge=1, description="GPUs that share each batch, one for each process that torchrun started"
    )
    output_dir: FilePath = Field(default="output/lora", description="folder to write to, or to resume in")

    @model_validator(mode="after")
    def _what_training_cannot_use(self) -> "TrainSettings":
        if self.compile:
            raise ValueError("got compile true, which training has no use for: leave it out")
        if self.dtype == "float16":
            raise ValueError("got dtype float16, in which gradients overflow: give bfloat16 or float32")
        if self.checkpointing == "off" and self.offload in ("blocks", "auto"):
            raise ValueError('got checkpointing "off" with streamed blocks, which need it: leave one out')
        if self.trigger is None and any(TRIGGER in text for text in self.sample_prompts or ()):
            raise ValueError(f"got {TRIGGER} in sample_prompts, but no trigger: give one")
        if self.batch_size < self.parallel:
            raise ValueError(
                f"got batch_size {self.batch_size} for {self.parallel} processes: give each an image at least"
            )
        return self

    @property
    def named_layers(self) -> tuple[int, ...]:
        """The layers that are named by number, in `layers` and in `rank`."""
        listed = () if isinstance(self.layers, str) else self.layers
        return tuple({*listed, *(self.rank if isinstance(self.rank, dict) else ())})

    def with_trigger(self, text: str) -> str:
        """The text with the trigger in its place."""
        return " ".join(text.replace(TRIGGER, self.trigger or "").split())

    def workload(self) -> Workload:
        """Return the demands of encoding the training images one by one."""
        return Workload(1, encodes=True)

    def recorded(self) -> dict[str, Any]:
        """Return the settings that a LoRA file tells of: those of the training, without paths."""
        names = (
            "model", "trigger", "layers", "parts", "rank", "alpha", "learning_rate", "batch_size", "sizes",
            "caption_dropout", "training_guidance", "seed", "dtype", "quantize",
        )  # fmt: skip
        fields = self.to_json()
        return {name: fields[name] for name in names}
