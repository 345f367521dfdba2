"""The source of edits: a reference, generated or a photograph's (Stable Flow, sections 3.2, 3.3).

A `Source` is where edits begin. Its steps hand out the image keys and values of some layers, one step after
the other. `flux.editing.reference` keeps those of all steps.
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
from flux.editing.store import KeptLayers
from flux.errors import InputError
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.sampling import Conditioning, ContextReuse, Passes, Step, VelocityModel, euler_step, step_at
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
        index: Number of the step.
        t: Noise level at the start.
        t_next: Noise level at the end.
        latent: The reference's latent at `t`, "R I 64".
        next_latent: Its latent at `t_next`, "R I 64".
        kept: Image keys and values by layer, and queries that are asked for, for each pass. Empty where none
            are needed.
        step: The Euler step itself. None if it was not computed, or is not kept.
        shift: Added to an edit's latent before its Euler step, "R I 64", by DirectEdit. If None, nothing is.
        drift: Added to an edit's latent after its Euler step, "R I 64". Where drift is corrected, it is
            `next_latent` minus the end of the reference's own Euler step. With a shift, it takes that off
            again. If None, nothing is added.
    """

    index: int
    t: float
    t_next: float
    latent: Tensor
    next_latent: Tensor
    kept: Passes[KeptLayers] = field(default_factory=lambda: Passes(KeptLayers({})))
    step: Step | None = None
    shift: Tensor | None = None
    drift: Tensor | None = None

    @property
    def velocity(self) -> Tensor:
        """The velocity that leads from `latent` to `next_latent`, "R I 64"."""
        return (self.next_latent - self.latent) / (self.t_next - self.t)

    def has_all(self, num_layers: int) -> bool:
        """Whether the keys and values of so many layers are kept, in every pass."""
        return all(len(kept) == num_layers for kept in self.kept)

    def tensors(self) -> list[Tensor]:
        """List all kept keys and values."""
        return [x for kept in self.kept for x in kept.tensors()]

    def num_bytes(self) -> int:
        """Return the memory that the kept keys and values take."""
        return sum(x.numel() * x.element_size() for x in self.tensors())

    def to(self, device: torch.device, pinned: bool = False) -> "ReferenceStep":
        """Copy the kept keys and values to a device, or with `pinned` to pinned memory; drop `step`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device).pin_memory() if pinned else x.to(device, non_blocking=True)

        return replace(self, kept=self.kept.map(lambda kept: kept.map(move)), step=None)

    def rounded(self, exact: frozenset[int]) -> "ReferenceStep":
        """Round the kept keys and values of all layers but those of `exact` to 8-bit floats."""
        return replace(self, kept=self.kept.map(lambda kept: KeptLayers.of(kept, exact)))

    def free(self) -> None:
        """Forget the kept keys and values."""
        for kept in self.kept:
            kept.clear()


@dataclass(frozen=True, eq=False)
class Source:
    """Where edits begin, and the path of their reference.

    It has one row, from which all edits begin, or one row for each edit of a single batch.

    Attributes:
        prompts: What each row shows.
        settings: Settings of the reference.
        levels: Noise levels of the schedule, from 1 to 0.
        cond: Steers its passes. For inverted photographs the guidance is 1, at which inversions are faithful.
        img_ids: Positions of the image tokens, "1 I 3".
        start: The noise of reference and edits, "R I 64". With FlowEdit, the clean latent.
        path: The latent before each step, and the last one. If None, the reference is sampled from `start`.
        scale: Divisor of latents before they are decoded.
        photo: The photograph. None for a generated reference.
        inverted_steps: The number of steps that an inversion took.
        inversion_free: Whether edits walk from the clean latent by FlowEdit.
    """

    prompts: list[str]
    settings: ResolvedEdit
    levels: list[float]
    cond: Conditioning
    img_ids: Tensor
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
        return (self.settings.correct_drift and not self.settings.shifts) or self.is_noised

    def decode(self, pipe: LoadedModel, latents: Tensor) -> list[Image.Image]:
        """Decode latents of the reference or of edits, "B I 64"."""
        return pipe.decode(latents / self.scale, *self.size, self.settings.watermark)

    def paste_back(self, image: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """Put a decoded image into the whole photograph, if the settings ask for it."""
        if self.photo is None or not self.settings.paste_back:
            return image
        return self.photo.with_part(image, mask)

    def cond_at(self, cond: Conditioning, index: int) -> Conditioning:
        """Return what steers step `index`: the negative pass begins with `cfg_from`."""
        begins = step_at(self.settings.cfg_from, self.num_steps)
        return cond if cond.negative is None or index >= begins else replace(cond, negative=None)

    def steps(
        self,
        model: VelocityModel,
        layers_at: Callable[[int], frozenset[int]],
        query_layers: frozenset[int] = frozenset(),
    ) -> Iterator[ReferenceStep]:
        """Compute the reference step by step.

        Args:
            model: The transformer.
            layers_at: Returns the layers whose keys and values are needed in a step, by its number. It is
                asked when the step begins.
            query_layers: Those of these layers whose queries are needed as well.

        Yields:
            Each step. Its keys and values are freed when the next step is asked for.
        """
        cond = self.cond
        if self.path is not None:
            # Inversions are unguided. The negative pass is there to keep keys and values for the edits.
            cond = replace(cond, true_cfg=1.0, mimic_scale=None)
        cond, context = cond.scheduled(model, self.levels[:-1]), ContextReuse.of(cond)

        def take_step(index: int, latent: Tensor) -> Step:
            layers, (t, t_next) = layers_at(index), self.levels[index : index + 2]
            where = model, latent, self.img_ids, self.cond_at(cond, index), t, t_next
            keep = Intervention(keep=layers, keep_queries=layers & query_layers)
            return euler_step(*where, keep, context=context)

        steps = (
            self._sampled(take_step) if self.path is None else self._replayed(take_step, layers_at, self.path)
        )
        for step in steps:
            yield step
            # The caller still holds this step while the next one is computed: only one may stay in memory.
            step.free()

    def _sampled(self, take_step: Callable[[int, Tensor], Step]) -> Iterator[ReferenceStep]:
        """Yield the steps of a generated reference: each begins where the one before it ended."""
        latent = self.start
        for index in range(self.num_steps):
            step = take_step(index, latent)
            kept = step.kept.map(KeptLayers)
            yield ReferenceStep(index, step.t, step.t_next, latent, step.latent, kept, step)
            latent = step.latent

    def _replayed(
        self,
        take_step: Callable[[int, Tensor], Step],
        layers_at: Callable[[int], frozenset[int]],
        path: Sequence[Tensor],
    ) -> Iterator[ReferenceStep]:
        """Yield the steps of a photograph's reference: each leads from one latent of the path to the next.

        A step that nothing is needed of is not computed.

        DirectEdit (arXiv 2605.02417) takes each step of an inverted photograph where the inversion took it.
        With z_i and z_(i+1) the path's latents before and after the step, and y_i an edit's,

            y_(i+1) = y_i + (t_(i+1) - t_i) v(y_i + z_(i+1) - z_i, t_i, target)

        For the reference's own prompt, y_i = z_i, that is Euler's inversion read backwards: exactly the path.
        """
        for index, (t, t_next) in enumerate(pairwise(self.levels)):
            latent, next_latent = path[index : index + 2]
            reference = ReferenceStep(index, t, t_next, latent, next_latent)
            if self.settings.shifts:
                shift = next_latent - latent
                latent, reference = latent + shift, replace(reference, shift=shift, drift=-shift)
            if layers_at(index) or self.corrects_drift:
                step = take_step(index, latent)
                reference = replace(reference, kept=step.kept.map(KeptLayers), step=step)
                if self.corrects_drift:
                    reference = replace(reference, drift=next_latent - step.latent)
            yield reference


# ---- finding the source


def find_source(
    pipe: LoadedModel,
    settings: ResolvedEdit,
    image: Image.Image | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Source:
    """Find the one source that the settings describe: generated, or the photograph `image`.

    A photograph without a prompt is described by `caption_model`. With `progress`, a prompt that does not fit
    the photograph is warned of. For the other arguments see `photo_source`.

    Raises:
        InputError: The settings name a photograph, but `image` is missing; there is no prompt, or the caption
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
    pipe: LoadedModel, settings: ResolvedEdit, prompts: Sequence[str], seeds: Sequence[int]
) -> Source:
    """Prepare references to be generated, one row for each prompt and seed."""
    size = settings.width, settings.height
    cond = pipe.condition(prompts, settings.guidance, **guidance_args(settings))
    levels, img_ids = pipe.schedule(settings.num_steps, *size), pipe.image_ids(1, *size)
    return Source(list(prompts), settings, levels, cond, img_ids, pipe.noise(seeds, *size))


def photo_source(
    pipe: LoadedModel,
    settings: ResolvedEdit,
    prompts: Sequence[str],
    clean: Tensor,
    photo: Photograph | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Source:
    """Add noise to photographs, one row each, invert them, or begin at their latents, as the settings say.

    Args:
        pipe: The models.
        settings: Settings of the edits.
        prompts: What each photograph shows.
        clean: The photographs' latents, "R I 64".
        photo: The photograph itself, if edits are to be put back into it.
        on_step: Called with each step of the inversion, its number and the number of steps of inversion and
            reference together. An exception from it ends the run.
        progress: Whether to show a progress bar.
    """
    size = settings.width, settings.height
    guidance = 1.0 if settings.inverts else FLOW_EDIT_GUIDANCE
    cond = pipe.condition(prompts, guidance, **guidance_args(settings))
    levels, img_ids = pipe.schedule(settings.num_steps, *size), pipe.image_ids(1, *size)
    source = Source(list(prompts), settings, levels, cond, img_ids, clean, photo=photo)
    if settings.inversion_free:
        return replace(source, inversion_free=True)
    if not settings.inverts:
        path = noised_path(pipe, clean, levels, *size, settings.seed)
        return replace(source, start=path[0], path=path)
    path, scale = inversion_path(pipe, source, clean, on_step, progress)
    return replace(source, start=path[0], path=path, scale=scale, inverted_steps=source.num_steps)


def inversion_path(
    pipe: LoadedModel, source: Source, clean: Tensor, on_step: OnStep | None = None, progress: bool = False
) -> tuple[list[Tensor], float]:
    """Invert photographs, as the settings of their source say. For the arguments see `photo_source`.

    Returns:
        The path that the reference replays, from noise to the photographs, and the divisor of its latents
        before they are decoded.
    """
    settings, levels, total = source.settings, source.levels, source.num_steps
    method = "euler" if settings.as_published else settings.inversion
    nudging = settings.nudging or (NUDGING if method == "euler" else 1.0)
    path = [nudging * clean]
    with pipe.denoising() as model:
        cond = replace(source.cond, negative=None).scheduled(model, levels[:-1])
        latents = INVERSIONS[method](model, path[0], source.img_ids, cond, levels)
        for index, latent in enumerate(with_bar(latents, "inversion", total, progress)):
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
    """Return the settings of true CFG, as arguments of `LoadedModel.condition`."""
    names = ("true_cfg", "negative_prompt", "mimic_scale", "mimic_percentile")
    return {name: getattr(settings, name) for name in names}


def with_bar(steps: Iterable[T], name: str, total: int, progress: bool) -> Iterator[T]:
    """Yield the steps, with a progress bar if `progress` is set."""
    return iter(tqdm(steps, desc=name, total=total, unit="step", disable=not progress))
