"""Which layers of a LoRA matter: every image again with the LoRA's update left out in some layers.

    OUTPUT/run.json                        settings, versions, checkpoint
    OUTPUT/prompt_000/full.png             the first image with the whole LoRA
    OUTPUT/prompt_000/base.png             the same without it
    OUTPUT/prompt_000/without_05.png       the same with the LoRA, but without its update of layer 5

It is the scan's protocol, on the LoRA's update instead of the layer. An ablation may be stopped at any
moment; started again, it resumes.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from flux import sampling
from flux.conditions.images import read_conditions
from flux.errors import InputError
from flux.images.io import save_image
from flux.loaded_model import LoadedModel
from flux.lora.contents import OpenLora, open_lora
from flux.lora.live import LiveLora, load_live
from flux.runs.folder import ResumableFolder
from flux.runs.record import image_metadata
from flux.runs.workers import finish_beside, run_tasks_of
from flux.sampling import Conditioning
from flux.scan.layers import LayerSet, layer_sets, layers_text
from flux.scan.skipper import LayerSkipper
from flux.settings.resolved import ResolvedAblate
from flux.weights.find import checkpoint_of

# These may differ between the starts of one ablation, since they do not change its images.
FREE_FIELDS = {
    "output_dir", "batch_size", "device", "offload", "compile", "workers", "ray_address", "metrics",
    "encoder", "top", "threshold", "gap",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How much of the LoRA an image has.

    Attributes:
        name: The name of the image's file, without its ending.
        strength: The LoRA's strength in all layers but those of `without`.
        without: The layers in which its update is left out.
    """

    name: str
    strength: float
    without: LayerSet = ()


FULL, BASE = Variant("full", 1.0), Variant("base", 0.0)


@dataclass(frozen=True)
class AblationTask:
    """Images that are made as one batch: several prompts, and the same part of the LoRA.

    Attributes:
        rows: The number of each image's row.
        prompts: The prompt of each row.
        seeds: The seed of each row.
        variant: The part of the LoRA.
    """

    rows: tuple[int, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    variant: Variant


class UpdateAblator:
    """Makes the images of tasks. The work of `flux.runs.workers.run_tasks_of`.

    It keeps the encoded prompts of the last task, so tasks of the same rows should follow one another.

    Args:
        settings: The settings of the ablation.
        loaded: The model and its LoRA. If None, they are loaded.

    Raises:
        InputError: As `load_live`, `read_conditions` and `LoadedModel.steered`.
    """

    pack, unpack = staticmethod(LayerSkipper.pack), staticmethod(LayerSkipper.unpack)

    def __init__(self, settings: ResolvedAblate, loaded: tuple[LoadedModel, LiveLora] | None = None):
        self.settings = settings
        pipe, self.live = loaded or load_live(settings)
        self.pipe = pipe.steered(read_conditions(settings), settings)
        self.encoded: tuple[tuple[str, ...], Conditioning] | None = None

    def run(self, task: AblationTask) -> Callable[[], list[Image.Image]]:
        """Make the task's images, in the order of its rows."""
        pipe, settings = self.pipe, self.settings
        width, height = settings.width, settings.height
        self.live.set_strength(task.variant.strength, dict.fromkeys(task.variant.without, settings.scale))
        cond = self._conditioning(task.prompts)
        latent = pipe.noise(task.seeds, width, height)
        levels = pipe.schedule(settings.num_steps, width, height)
        ids = pipe.image_ids(len(latent), width, height)
        with pipe.denoising() as model:
            for step in sampling.sample(model, latent, ids, cond, levels):
                latent = step.latent
        images = pipe.decode(latent, width, height, settings.watermark)
        return lambda: images

    def _conditioning(self, prompts: tuple[str, ...]) -> Conditioning:
        if self.encoded is None or self.encoded[0] != prompts:
            settings = self.settings
            guidance, true_cfg = settings.guidance, settings.true_cfg
            cond = self.pipe.condition(prompts, guidance, true_cfg, settings.negative_prompt)
            self.encoded = prompts, cond
        return self.encoded[1]


class Ablation:
    """An ablation and its folder. The images that are there already are kept.

    Args:
        settings: The settings of the ablation.

    Attributes:
        settings: The same settings.
        lora: The LoRA's file, opened.
        folder: The folder that the images are written to.
        layer_sets: The sets of layers in which the update is left out.
        tasks: All tasks, whether their images are there or not.

    Raises:
        InputError: The LoRA does not fit the model, or changes nothing in one of the layers; or the folder
            holds another run.
    """

    def __init__(self, settings: ResolvedAblate):
        self.settings = settings
        [lora] = settings.lora
        self.lora = open_lora(lora.file)
        _check(settings, self.lora)
        named = self.lora.layers if settings.layers == "all" else settings.layers
        self.layer_sets = layer_sets(named, self.lora.num_layers)
        self._folder = ResumableFolder(
            Path(settings.output_dir), settings.demo, "an ablation", settings.program
        )
        self.folder = self._folder.path
        self._folder.claim(settings, FREE_FIELDS, checkpoint_of(settings), "weights or lora")
        self.tasks = self._plan()

    def record(self) -> dict[str, Any]:
        """The folder's run.json."""
        return self._folder.record()

    def _plan(self) -> list[AblationTask]:
        variants = [FULL, BASE, *map(variant_of, self.layer_sets)]
        size, entries = self.settings.batch_size, self.settings.entries
        rows = [range(start, min(start + size, len(entries))) for start in range(0, len(entries), size)]
        return [
            AblationTask(
                tuple(batch),
                tuple(entries[row].prompt for row in batch),
                tuple(entries[row].seed for row in batch),
                variant,
            )
            for batch in rows
            for variant in variants
        ]

    def image_path(self, row: int, variant: Variant) -> Path:
        """The path of an image."""
        return self.folder / f"prompt_{row:03d}" / f"{variant.name}.png"

    def _missing(self, task: AblationTask) -> list[int]:
        """The places in the task's batch of the images that are not there yet."""
        paths = [self.image_path(row, task.variant) for row in task.rows]
        return [place for place, path in enumerate(paths) if not path.exists()]

    def pending(self) -> list[AblationTask]:
        """The tasks of which images are missing."""
        return [task for task in self.tasks if self._missing(task)]

    def run(self, loaded: tuple[LoadedModel, LiveLora] | None = None, progress: bool = True) -> None:
        """Make the missing images. With more than one worker or a Ray address, Ray shares the work.

        Args:
            loaded: The model and its LoRA. If None, they are loaded once there is something to make.
            progress: Whether to show a progress bar.

        Raises:
            InputError: An image cannot be written, or as `UpdateAblator` or `run_tasks_of`.
        """
        settings, pending = self.settings, self.pending()
        self._folder.remove_leftovers()
        results = run_tasks_of(settings, UpdateAblator, (loaded,), pending)

        def write(number: int, decode: Callable[[], list[Image.Image]]) -> AblationTask:
            task, images = pending[number], decode()
            for place in self._missing(task):
                more = {"without": task.variant.without, "strength": task.variant.strength}
                metadata = image_metadata(settings, task.prompts[place], task.seeds[place], **more)
                save_image(images[place], self.image_path(task.rows[place], task.variant), metadata)
            return task

        total = sum(len(task.rows) for task in self.tasks)
        missing = sum(len(task.rows) for task in pending)
        with (
            tqdm(
                total=total, initial=total - missing, desc="ablate", unit="image", disable=not progress
            ) as bar,
            closing(finish_beside(results, write)) as written,
        ):
            for task in written:
                bar.update(len(task.rows))


def variant_of(layers: LayerSet) -> Variant:
    """The LoRA without its update of these layers."""
    return Variant(f"without_{layers_text(layers)}", 1.0, layers)


def _check(settings: ResolvedAblate, lora: OpenLora) -> None:
    if settings.model not in lora.models:
        raise InputError(
            f"Got {lora.path}, a LoRA for {lora.models[0]}, but the model is {settings.model}: name one of "
            f"{', '.join(lora.models)}"
        )
    if not lora.layers:
        raise InputError(
            f"Got {lora.path}, which changes none of the model's layers: nothing can be left out"
        )
    unchanged = sorted(set(settings.named_layers) - set(lora.layers))
    if unchanged:
        raise InputError(
            f"Got layers {unchanged}, in which {lora.path} changes nothing: it changes {lora.layers}"
        )
