"""Images with layers skipped, made batch by batch (Stable Flow, section 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from flux.conditions.images import read_conditions
from flux.inputs import Streams
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.sampling import Conditioning, ContextReuse, Passes, euler_step, sample, streams
from flux.scan.layers import LayerSet
from flux.settings.resolved import ResolvedSkip
from flux.weights.open_model import OpenModel


@dataclass(frozen=True)
class SkipTask:
    """Images that are made as one batch: one prompt and seed, and in each row another set of skipped layers.

    The images depend on the task and the settings alone, not on what was made before or by which worker. If
    only some images of a batch are there, the whole batch is made again.

    Attributes:
        row: The number of the reference.
        prompt: The reference's prompt.
        seed: The reference's seed.
        layer_sets: The layers to skip in each image of the batch. `REFERENCE` skips none.
    """

    row: int
    prompt: str
    seed: int
    layer_sets: tuple[LayerSet, ...]


@dataclass(frozen=True)
class _Reference:
    """The parts of one reference's first step that its images with skipped layers share.

    Attributes:
        key: The prompt and the seed.
        cond: The conditioning, with the modulations of all steps.
        streams: The streams that enter each layer in the first step, for both passes of true CFG.
    """

    key: tuple[str, int]
    cond: Conditioning
    streams: list[Passes[Streams]]


class LayerSkipper:
    """Makes the images of tasks. The work of `flux.runs.workers.run_tasks`.

    It keeps what the tasks of one reference share, so tasks of one reference should follow one another.

    Args:
        settings: The settings of the sweep.
        pipe: The model. If None, it is loaded.
        opened: The model's files, if they are open already.

    Attributes:
        reference: The kept parts of the last task's reference.

    Raises:
        InputError: As `LoadedModel.load`, `read_conditions` and `LoadedModel.steered`.
    """

    def __init__(
        self, settings: ResolvedSkip, pipe: LoadedModel | None = None, opened: OpenModel | None = None
    ):
        self.settings, pipe = settings, pipe or LoadedModel.load(settings, opened=opened)
        self.pipe = pipe.steered(read_conditions(settings), settings)
        self.decodes_beside = decodes_beside(self.pipe)
        # On the stream of the steps, decoding would wait for the steps of the next images.
        has_stream = self.decodes_beside and self.pipe.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.pipe.device) if has_stream else None
        self.reference: _Reference | None = None

    def make(self, task: SkipTask) -> list[Image.Image]:
        """Make the task's images, in the order of its sets."""
        return self.run(task)()

    def run(self, task: SkipTask) -> Callable[[], list[Image.Image]]:
        """Take the task's steps.

        Returns:
            A function that returns the images. It may be called in another thread while the next task runs.
        """
        decode = partial(self.decode, self.denoise(task))
        if self.decodes_beside:
            return decode
        images = decode()
        return lambda: images

    @staticmethod
    def pack(decode: Callable[[], list[Image.Image]]) -> list[bytes]:
        """Turn the result of `run` into PNG files, to travel between processes."""
        files = []
        for image in decode():
            buffer = BytesIO()
            # Six times as fast as Pillow's default. The files are a sixth larger, but only travel.
            image.save(buffer, "PNG", compress_level=1)
            files.append(buffer.getvalue())
        return files

    @staticmethod
    def unpack(files: list[bytes]) -> Callable[[], list[Image.Image]]:
        """Turn what `pack` made into a result of `run` again."""
        return lambda: [Image.open(BytesIO(file)).convert("RGB") for file in files]

    def denoise(self, task: SkipTask) -> Tensor:
        """Return the task's final latents, "B I 64"."""
        pipe, settings = self.pipe, self.settings
        width, height, batch = settings.width, settings.height, len(task.layer_sets)
        levels = pipe.schedule(settings.num_steps, width, height)
        noise = pipe.noise([task.seed], width, height)
        reference = self._reference_of(task, noise, levels)
        cond, latent = reference.cond.expanded(batch), noise.expand(batch, -1, -1)
        ids = pipe.image_ids(batch, width, height)
        skip = tuple(frozenset(layers) for layers in task.layer_sets)
        intervention = Intervention(skip=skip, skip_scale=settings.scale)
        with pipe.denoising() as model:
            # Below the first skipped layer, the first step is the reference's own.
            first_layer = min((min(layers) for layers in task.layer_sets if layers), default=0)
            context = ContextReuse.of(cond)
            # Later steps need the context's keys and values of all layers.
            start = reference.streams[0 if context else first_layer]
            first = model, latent, ids, cond, levels[0], levels[1], intervention
            latent = euler_step(*first, start=start, context=context).latent
            for step in sample(model, latent, ids, cond, levels[1:], intervention, context=context):
                latent = step.latent
        return latent

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode final latents, on a CUDA stream of their own if the next task runs meanwhile."""
        settings = self.settings
        with torch.cuda.stream(self._stream):
            return self.pipe.decode(latents, settings.width, settings.height, settings.watermark)

    def _reference_of(self, task: SkipTask, noise: Tensor, levels: list[float]) -> _Reference:
        key = (task.prompt, task.seed)
        if self.reference and self.reference.key == key:
            return self.reference
        self.reference = None  # frees the last reference's streams first: those of all layers are large
        settings = self.settings
        cond = self.pipe.condition(
            [task.prompt], settings.guidance, settings.true_cfg, settings.negative_prompt
        )
        ids = self.pipe.image_ids(1, settings.width, settings.height)
        with self.pipe.denoising() as model:
            cond = cond.scheduled(model, levels[:-1])
            self.reference = _Reference(key, cond, streams(model, noise, ids, cond, levels[0]))
        return self.reference


def decodes_beside(pipe: LoadedModel) -> bool:
    """Whether images are decoded while the next ones are denoised: on a GPU with room for all models.

    On two CPU cores, which each model uses fully, a sweep would take a third longer.
    """
    return pipe.device.type == "cuda" and not pipe.offloaded
