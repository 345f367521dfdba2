"""The reference of edits: generated, or a photograph's inversion replayed (Stable Flow, sections 3.2, 3.3).

A `Source` is where edits begin. Its steps hand out the image keys and values of some layers, one step after
the other. A `Reference` keeps those of all steps for later edits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux.captions.captioner import describe_image
from flux.editing.flow_edit import FLOW_EDIT_GUIDANCE
from flux.editing.inversion import INVERSIONS
from flux.editing.noising import noised_path
from flux.editing.photo import Photograph
from flux.editing.prompt_fit import warn_of_unfit_prompt
from flux.editing.store import KeptLayers, rounded_bytes
from flux.errors import InputError
from flux.intervention import Intervention
from flux.pipeline import Pipeline
from flux.runtime.devices import total_memory
from flux.sampling import Conditioning, Passes, Step, VelocityModel, euler_step, step_at
from flux.settings.resolved import ResolvedEdit

OnStep = Callable[[Step, int, int], object]
"""Called with a step, its number, and the number of steps of the whole work."""
NUDGING = 1.15  # of Euler's inversion (section 3.3)
T = TypeVar("T")


# ---- one reference, step by step


@dataclass(frozen=True, eq=False)
class ReferenceStep:
    """The reference in one step.

    Attributes:
        t: noise level at the start.
        t_next: noise level at the end.
        latent: the reference's latent at `t`, "R I 64".
        next_latent: its latent at `t_next`, "R I 64".
        kept: image keys and values by layer, for each pass. Empty where none are needed.
        step: the Euler step itself. None if it was not computed, or is not kept.
        drift: `next_latent` minus the latent that the Euler step leads to, "R I 64"; it is added to every
            edit's step. If None, edits are not corrected.
    """

    t: float
    t_next: float
    latent: Tensor
    next_latent: Tensor
    kept: Passes[KeptLayers] = field(default_factory=lambda: Passes(KeptLayers({})))
    step: Step | None = None
    drift: Tensor | None = None

    @property
    def velocity(self) -> Tensor:
        """The velocity that leads from `latent` to `next_latent`, "R I 64"."""
        return (self.next_latent - self.latent) / (self.t_next - self.t)

    def has_all(self, num_layers: int) -> bool:
        """Whether the keys and values of so many layers are kept, in every pass."""
        return all(len(kept) == num_layers for kept in self.kept)

    def tensors(self) -> list[Tensor]:
        """Lists all kept keys and values."""
        return [x for kept in self.kept for x in kept.tensors()]

    def num_bytes(self) -> int:
        """Returns the memory that the kept keys and values take."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def to(self, device: torch.device, pinned: bool = False) -> "ReferenceStep":
        """Copies the kept keys and values to a device, or with `pinned` to pinned memory; drops `step`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device).pin_memory() if pinned else x.to(device, non_blocking=True)

        return replace(self, kept=self.kept.map(lambda kept: kept.map(move)), step=None)

    def rounded(self, exact: frozenset[int]) -> "ReferenceStep":
        """Rounds the kept keys and values of all layers but those of `exact` to 8-bit floats."""
        return replace(self, kept=self.kept.map(lambda kept: KeptLayers.of(kept, exact)))

    def free(self) -> None:
        """Forgets the kept keys and values."""
        for kept in self.kept:
            kept.clear()


@dataclass(frozen=True, eq=False)
class Source:
    """Where edits begin, and the path of their reference.

    It has one row, from which all edits begin, or one row for each edit of a single batch.

    Attributes:
        prompts: what each row shows.
        settings: of the reference.
        levels: noise levels of the schedule, from 1 to 0.
        cond: steers its passes. For inverted photographs the guidance is 1, at which inversions are faithful.
        start: the noise of reference and edits, "R I 64". With FlowEdit, the clean latent.
        path: the latent before each step, and the last one. If None, the reference is sampled from `start`.
        scale: divisor of latents before they are decoded.
        photo: the photograph. None for a generated reference.
        inverted_steps: the number of steps that an inversion took.
        inversion_free: whether edits walk from the clean latent by FlowEdit.
    """

    prompts: list[str]
    settings: ResolvedEdit
    levels: list[float]
    cond: Conditioning
    start: Tensor
    path: list[Tensor] | None = None
    scale: float = 1.0
    photo: Photograph | None = None
    inverted_steps: int = 0
    inversion_free: bool = False

    @property
    def num_steps(self) -> int:
        """The number of steps of reference and edits."""
        return len(self.levels) - 1

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.settings.width, self.settings.height

    @property
    def can_be_sparse(self) -> bool:
        """Whether edits may leave out the tokens that they may not change.

        Not where the reference's pass would be computed for their sake alone, as in replays without drift
        correction.
        """
        return self.path is None or not self.settings.replays

    @property
    def is_noised(self) -> bool:
        """Whether noise is added to the photograph, in place of an inversion."""
        return self.path is not None and not self.settings.inverts

    @property
    def corrects_drift(self) -> bool:
        """Whether what the reference's own steps miss of its path is added to the edits' steps."""
        return self.settings.correct_drift or self.is_noised

    def decode(self, pipe: Pipeline, latents: Tensor) -> list[Image.Image]:
        """Decodes latents of the reference or of edits, "B I 64"."""
        return pipe.decode(latents / self.scale, *self.size, self.settings.watermark)

    def paste_back(self, image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """Puts a decoded image into the whole photograph, if the settings ask for it."""
        if self.photo is None or not self.settings.paste_back:
            return image
        return self.photo.with_part(image, mask)

    def cond_at(self, cond: Conditioning, index: int) -> Conditioning:
        """Returns what steers step `index`: the negative pass begins with `cfg_from`."""
        begins = step_at(self.settings.cfg_from, self.num_steps)
        return cond if index >= begins else replace(cond, negative=None)

    def steps(
        self, model: VelocityModel, img_ids: Tensor, layers_at: Callable[[int], frozenset[int]]
    ) -> Iterator[ReferenceStep]:
        """Computes the reference step by step. A pass that nothing is needed of is left out.

        Args:
            model: the transformer.
            img_ids: positions of the image tokens, "1 I 3".
            layers_at: returns the layers whose keys and values are needed in a step, by its number. It is
                asked when the step begins.

        Yields:
            Each step. Its keys and values are freed when the next step is asked for.
        """
        latent, cond = self.start, self.cond
        if self.path is not None:
            # Inversions are unguided. The negative pass is there to keep keys and values for the edits.
            cond = replace(cond, true_cfg=1.0, mimic_scale=None)
        cond = cond.scheduled(model, self.levels[:-1])
        for index, (t, t_next) in enumerate(pairwise(self.levels)):
            layers = layers_at(index)
            if self.path is not None:
                latent = self.path[index]
                if not layers and not self.corrects_drift:
                    yield ReferenceStep(t, t_next, latent, self.path[index + 1])
                    continue
            at_index = self.cond_at(cond, index)
            step = euler_step(model, latent, img_ids, at_index, t, t_next, Intervention(keep=layers))
            next_latent, drift = step.latent, None
            if self.path is not None:
                next_latent = self.path[index + 1]
                drift = next_latent - step.latent if self.corrects_drift else None
            reference_step = ReferenceStep(
                t, t_next, latent, next_latent, step.kept.map(KeptLayers), step, drift
            )
            yield reference_step
            # The caller still holds this step while the next one is computed: only one may stay in memory.
            reference_step.free()
            latent = next_latent


# ---- finding the source


def find_source(
    pipe: Pipeline,
    settings: ResolvedEdit,
    image: Image.Image | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Source:
    """Finds the one source that the settings describe: generated, or the photograph `image`.

    A photograph without a prompt is described by `caption_model`. With `progress`, a prompt that does not fit
    the photograph is warned of. For the other arguments see `photo_source`.

    Raises:
        InputError: the settings name a photograph, but `image` is missing; there is no prompt, or the caption
            model cannot write one.
    """
    if settings.photo and image is None:
        raise InputError(
            f"Got the setting photo {str(settings.photo)!r}, but no image: pass what read_image returns"
        )
    photo = Photograph.of(image, settings.width, settings.height) if image else None
    prompt = settings.prompt
    if prompt is None:
        if photo is None or settings.caption_model is None:
            raise InputError("Got no prompt: say what the reference shows, or give a photo and caption_model")
        prompt = describe_image(photo.part, settings.caption_model, str(pipe.device))
    if photo is None:
        return generated_source(pipe, settings, [prompt], [settings.seed])
    clean = pipe.encode(photo.part)
    if progress and settings.prompt is not None:
        warn_of_unfit_prompt(pipe, prompt, clean, settings.width, settings.height)
    return photo_source(pipe, settings, [prompt], clean, photo, on_step, progress)


def generated_source(
    pipe: Pipeline, settings: ResolvedEdit, prompts: Sequence[str], seeds: Sequence[int]
) -> Source:
    """Prepares references to be generated, one row for each prompt and seed."""
    size = settings.width, settings.height
    cond = pipe.condition(prompts, settings.guidance, **guidance_args(settings))
    levels = pipe.schedule(settings.num_steps, *size)
    return Source(list(prompts), settings, levels, cond, pipe.noise(seeds, *size))


def photo_source(
    pipe: Pipeline,
    settings: ResolvedEdit,
    prompts: Sequence[str],
    clean: Tensor,
    photo: Photograph | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Source:
    """Adds noise to photographs, one row each, inverts them, or begins at their latents, as the settings say.

    Args:
        pipe: the models.
        settings: of the edits.
        prompts: what each photograph shows.
        clean: the photographs' latents, "R I 64".
        photo: the photograph itself, if edits are to be put back into it.
        on_step: called with each step of the inversion, its number and the number of steps of inversion and
            reference together. An exception from it ends the run.
        progress: whether to show a progress bar.
    """
    levels = pipe.schedule(settings.num_steps, settings.width, settings.height)
    inverts = settings.inverts
    cond = pipe.condition(prompts, 1.0 if inverts else FLOW_EDIT_GUIDANCE, **guidance_args(settings))
    if settings.inversion_free:
        return Source(list(prompts), settings, levels, cond, clean, photo=photo, inversion_free=True)
    if not inverts:
        path = noised_path(pipe, clean, levels, settings.width, settings.height, settings.seed)
        return Source(list(prompts), settings, levels, cond, path[0], path, photo=photo)
    path, scale = inversion_path(pipe, settings, cond, clean, levels, on_step, progress)
    return Source(list(prompts), settings, levels, cond, path[0], path, scale, photo, settings.num_steps)


def inversion_path(
    pipe: Pipeline,
    settings: ResolvedEdit,
    cond: Conditioning,
    clean: Tensor,
    levels: Sequence[float],
    on_step: OnStep | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], float]:
    """Inverts latents of photographs, "R I 64".

    Returns:
        The path that the reference replays, from noise to the photographs, and the divisor of its latents
        before they are decoded.
    """
    method = "euler" if settings.as_published else settings.inversion
    nudging = settings.nudging or (NUDGING if method == "euler" else 1.0)
    ids, cond = pipe.image_ids(1, settings.width, settings.height), replace(cond, negative=None)
    path, total = [nudging * clean], len(levels) - 1
    with pipe.denoising() as model:
        cond = cond.scheduled(model, levels[:-1])
        latents = INVERSIONS[method](model, path[0], ids, cond, levels)
        for index, latent in enumerate(_with_bar(latents, "inversion", total, progress)):
            if on_step:
                t, noisier = levels[-1 - index], levels[-2 - index]
                velocity = (latent - path[0]) / (noisier - t)
                on_step(Step(noisier, t, latent, velocity), index, 2 * total)
            path.insert(0, latent)
    if settings.as_published:
        # The public code replays the path with a lag. After step i it replaces the latent by the one of two
        # levels before, after the first step by the cleanest noisy one. It decodes without undoing nudging.
        return [path[0], path[-2], *path[:-2]], 1.0
    return path, nudging


def guidance_args(settings: ResolvedEdit) -> dict[str, Any]:
    """Returns the settings of true CFG, as arguments of `Pipeline.condition`."""
    names = ("true_cfg", "negative_prompt", "mimic_scale", "mimic_percentile")
    return {name: getattr(settings, name) for name in names}


# ---- a kept reference


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference whose keys and values are kept, so that a step of another edit computes the edit alone.

    Attributes:
        source: where it began.
        layers: the layers whose keys and values are kept, the most vital first.
        steps: all steps. Empty for FlowEdit, which injects nothing.
        image: the reference decoded. For a photograph, the autoencoder's reconstruction.
    """

    source: Source
    layers: tuple[int, ...]
    steps: list[ReferenceStep]
    image: Image.Image


def keep_reference(
    pipe: Pipeline,
    settings: ResolvedEdit,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    *,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Reference:
    """Generates or inverts the reference, and keeps its image keys and values at every step.

    They are kept on the device if they fill at most half of its free memory, else in main memory. If those of
    all layers fit on the device, they are kept, so that edits can be sparse; if need be, all but those of the
    given layers in 8 bits.

    Args:
        pipe: the models.
        settings: describe the reference. Their edits are ignored.
        layers: where to keep keys and values, the most vital layers first.
        photo: the photograph to edit, described by the prompt. If None, the reference is generated.
        on_step: called with each step, its number and the number of steps. An exception from it ends the run.
        progress: whether to show progress bars.
    """
    source = find_source(pipe, settings, photo, on_step, progress)
    steps: list[ReferenceStep] = []
    latent, done, on_device = source.start, source.inverted_steps, True
    if not source.inversion_free:
        with pipe.denoising() as model:
            vital = frozenset(layers)
            kept, rounds = _layers_to_keep(pipe, settings, source, vital)
            computed = source.steps(model, pipe.image_ids(1, *source.size), lambda _: kept)
            for index, step in enumerate(_with_bar(computed, "reference", source.num_steps, progress)):
                step = step.rounded(vital) if rounds else step
                if index == 0:
                    on_device = fits_on_device(pipe.device, source.num_steps * step.num_bytes())
                if on_step and step.step:
                    on_step(step.step, done + index, done + source.num_steps)
                steps.append(step.to(pipe.device) if on_device else step.to(torch.device("cpu"), pinned=True))
        latent = steps[-1].next_latent
    [image] = source.decode(pipe, latent)
    return Reference(source, tuple(layers), steps, source.paste_back(image))


def _layers_to_keep(
    pipe: Pipeline, settings: ResolvedEdit, source: Source, vital: frozenset[int]
) -> tuple[frozenset[int], bool]:
    """Decides what a reference keeps: all layers for sparse edits if there is room, else the vital ones.

    Returns:
        The layers, and whether all but the vital ones are rounded to 8 bits.
    """
    params, every = pipe.model.params, frozenset(range(pipe.model.num_layers))
    if not settings.sparse or not source.can_be_sparse:
        return vital, False
    passes = 1 if source.cond.negative is None else 2
    of_layer = passes * source.num_steps * 2 * source.start.shape[1] * params.hidden_size
    whole = pipe.dtype.itemsize * of_layer
    rounded = rounded_bytes(of_layer, params.hidden_size // params.num_heads)
    if _has_room(pipe.device, len(every) * whole):
        return every, False
    if _has_room(pipe.device, len(vital) * whole + (len(every) - len(vital)) * rounded):
        return every, True
    return vital, False


def _has_room(device: torch.device, size: int) -> bool:
    """Whether the device has room for so many bytes. Without a GPU, the memory is shared with all else."""
    memory = None if device.type == "cuda" else total_memory(device)
    return fits_on_device(device, size) and (memory is None or size <= memory / 4)


def fits_on_device(device: torch.device, size: int) -> bool:
    """Whether so many bytes fill at most half of the device's memory, free or reserved by the allocator."""
    if device.type != "cuda":
        return True
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= (torch.cuda.mem_get_info(device)[0] + reserve) / 2


def prefetch(steps: Sequence[ReferenceStep], device: torch.device) -> Iterator[ReferenceStep]:
    """Yields kept steps on the device. Those in main memory are copied during the step before."""
    tensors = steps[0].tensors()
    if device.type != "cuda" or not tensors or tensors[0].is_cuda:
        yield from steps
        return
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(step: ReferenceStep) -> ReferenceStep:
        with torch.cuda.stream(stream):
            fetched = step.to(device)
        for x in fetched.tensors():
            x.record_stream(main)
        return fetched

    coming = fetch(steps[0])
    for following in (*steps[1:], None):
        main.wait_stream(stream)
        current, coming = coming, fetch(following) if following else coming
        yield current
        current.free()


def _with_bar(steps: Iterable[T], name: str, total: int, progress: bool) -> Iterator[T]:
    return iter(tqdm(steps, desc=name, total=total, unit="step", disable=not progress))
