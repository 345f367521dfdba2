"""The reference of edits: generated, or a photograph's inversion replayed, its keys and values step by step
(Stable Flow, sections 3.2 and 3.3).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux.editing.caption import describe
from flux.editing.flow_edit import FLOW_EDIT_GUIDANCE
from flux.editing.inversion import INVERSIONS
from flux.editing.photo import Photograph
from flux.intervention import Intervention
from flux.math import KeysValues
from flux.model import Flux
from flux.pipeline import Pipeline
from flux.sampling import Conditioning, Step, euler_step, step_at
from flux.settings.demos import EditSettings

OnStep = Callable[[Step, int, int], object]
NUDGING = 1.15  # of Euler's inversion (section 3.3)


@dataclass(frozen=True, eq=False)
class Moment:
    """The reference at one step: its latents at noise levels t and t_next, "1 I 64" each, and the image keys
    and values kept of its pass there, if any was needed, by layer.

    Attributes:
        drift: what a step from `latent` misses of `next_latent`, "1 I 64", for edits to make up for as well;
            None: nothing.
    """

    t: float
    t_next: float
    latent: Tensor
    next_latent: Tensor
    kept: dict[int, KeysValues]
    kept_negative: dict[int, KeysValues] | None = None
    step: Step | None = None
    drift: Tensor | None = None

    def bytes(self) -> int:
        pairs = [*self.kept.values(), *(self.kept_negative or {}).values()]
        return sum(x.numel() * x.element_size() for pair in pairs for x in pair)

    def on(self, device: torch.device, pinned: bool = False) -> "Moment":
        """With its keys and values there, in pinned memory if that is asked for."""

        def there(x: Tensor) -> Tensor:
            return x.to(device).pin_memory() if pinned else x.to(device, non_blocking=True)

        def moved(kept: dict[int, KeysValues] | None) -> dict[int, KeysValues] | None:
            return kept and {layer: tuple(map(there, pair)) for layer, pair in kept.items()}

        return replace(self, kept=moved(self.kept), kept_negative=moved(self.kept_negative), step=None)


@dataclass(frozen=True, eq=False)
class Source:
    """Where edits begin and what they follow, before any of its keys and values are known.

    Attributes:
        prompts: what each reference shows: one for all edits, or one for each edit of a single batch.
        settings: of the reference; complete ones.
        cond: steers its passes; conds of photographs have guidance 1, at which inversions are faithful.
        path: the latents that its passes see, and the last one after them; None: it is sampled from `start`.
        start: the noise of reference and edits, "R I 64"; without inversion the clean latent.
        scale: what latents are divided by before they are decoded.
        photo: None for a generated reference.
        inversion_free: whether edits walk from the clean latent by FlowEdit.
    """

    prompts: list[str]
    settings: EditSettings
    levels: list[float]
    cond: Conditioning
    start: Tensor
    path: list[Tensor] | None = None
    scale: float = 1.0
    photo: Photograph | None = None
    inversion_free: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.levels) - 1

    @property
    def size(self) -> tuple[int, int]:
        return self.settings.width, self.settings.height

    @property
    def inverted_steps(self) -> int:
        """How many steps the inversion took."""
        return 0 if self.path is None else self.num_steps

    def placed(self, picture: Image.Image, mask: Image.Image | None = None) -> Image.Image:
        """A decoded picture, put into the whole photograph where that is asked for."""
        back = self.photo is not None and self.settings.paste_back
        return self.photo.with_part(picture, mask) if back else picture

    def at(self, cond: Conditioning, index: int) -> Conditioning:
        """What steers step `index`: the second pass only begins with `cfg_from`."""
        begins = step_at(self.settings.cfg_from, self.num_steps)
        return cond if index >= begins else replace(cond, negative=None)

    def moments(self, model: Flux, ids: Tensor, keep: Callable[[int], frozenset[int]]) -> Iterator[Moment]:
        """Each step, with the keys and values of the layers that `keep` says for its number, asked when it
        begins; a pass that gives nothing that is needed is left out.
        """
        latent, steering = self.start, self.cond
        if self.path is not None:
            # Inversions go unguided; the negative pass is there for the edits to take from.
            steering = replace(steering, true_cfg=1.0, mimic_scale=None)
        steering = steering.scheduled(model, self.levels[:-1])
        for index, (t, t_next) in enumerate(pairwise(self.levels)):
            if self.path is not None:
                latent = self.path[index]
            layers = keep(index)
            if self.path is not None and not layers and not self.settings.correct_drift:
                yield Moment(t, t_next, latent, self.path[index + 1], {})
                continue
            keeping = Intervention(keep=layers)
            step = euler_step(model, latent, ids, self.at(steering, index), t, t_next, keeping)
            before, latent, drift = latent, step.latent, None
            if self.path is not None:
                latent = self.path[index + 1]
                drift = latent - step.latent if self.settings.correct_drift else None
            yield Moment(t, t_next, before, latent, step.kept, step.kept_negative, step, drift)
            # Before the next step's keys and values are made, else two steps' lie in memory at once.
            step = None


@dataclass(frozen=True, eq=False)
class Reference:
    """A reference whose keys and values are kept, so that another edit costs one image a step.

    Attributes:
        layers: where they are kept, the most vital first.
        moments: one for each step; none for FlowEdit, which takes nothing.
        picture: the reference decoded; of a photograph, what the autoencoder makes of it.
    """

    source: Source
    layers: tuple[int, ...]
    moments: list[Moment]
    picture: Image.Image


def keep_reference(
    pipe: Pipeline,
    settings: EditSettings,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    *,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Reference:
    """Makes, or inverts, the reference that `settings` describe, and keeps its image keys and values of
    `layers` at every step: on the device if they fill at most half of what is free there, else in main
    memory.

    Args:
        settings: complete ones; the edits in them are not looked at.
        photo: edit this picture, which the prompt describes, instead of a generated one.
        on_step: called with each step, its number and how many there are; an exception from it ends the run.
    """
    source = find_source(pipe, settings, photo, on_step, progress)
    if source.inversion_free:
        [picture] = pipe.decode(source.start, *source.size, settings.watermark)
        return Reference(source, tuple(layers), [], source.placed(picture))
    ids = pipe.image_ids(1, *source.size)
    moments, on_device = [], True
    done = source.inverted_steps
    with pipe.denoising() as model:
        found = source.moments(model, ids, lambda index: frozenset(layers))
        for index, moment in enumerate(_bar(found, "reference", source.num_steps, progress)):
            if index == 0:
                on_device = _fits(pipe.device, source.num_steps * moment.bytes())
            if on_step and moment.step:
                on_step(moment.step, done + index, done + source.num_steps)
            moments.append(moment.on(pipe.device if on_device else torch.device("cpu"), not on_device))
    [picture] = pipe.decode(moments[-1].next_latent / source.scale, *source.size, settings.watermark)
    return Reference(source, tuple(layers), moments, source.placed(picture))


def _fits(device: torch.device, size: int) -> bool:
    """Whether so many bytes are at most half of what is free on the device, with its allocator's reserve."""
    if device.type != "cuda":
        return True
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= (torch.cuda.mem_get_info(device)[0] + reserve) / 2


def ahead(moments: Sequence[Moment], device: torch.device) -> Iterator[Moment]:
    """The moments on the device; those in main memory are copied while the one before is at work."""
    if device.type != "cuda" or not moments[0].kept or next(iter(moments[0].kept.values()))[0].is_cuda:
        yield from moments
        return
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(moment: Moment) -> Moment:
        with torch.cuda.stream(stream):
            fetched = moment.on(device)
        for pair in (*fetched.kept.values(), *(fetched.kept_negative or {}).values()):
            for x in pair:
                x.record_stream(main)
        return fetched

    coming = fetch(moments[0])
    for following in (*moments[1:], None):
        main.wait_stream(stream)
        moment, coming = coming, following and fetch(following)
        yield moment


def find_source(
    pipe: Pipeline, settings: EditSettings, image: Image.Image | None, on_step: OnStep | None, progress: bool
) -> Source:
    """Finds the one reference that the settings describe: generated, or the photograph `image`.

    A photograph without a prompt is described by `caption_model`.
    """
    if image is None:
        return generated_source(pipe, settings, [settings.prompt], [settings.seed])
    photo = Photograph.of(image, settings.width, settings.height)
    prompt = settings.prompt
    if prompt is None:
        prompt = describe(photo.part, settings.caption_model, str(pipe.device))
    return photo_source(pipe, settings, [prompt], pipe.encode(photo.part), photo, on_step, progress)


def generated_source(
    pipe: Pipeline, settings: EditSettings, prompts: Sequence[str], seeds: Sequence[int]
) -> Source:
    """Prepares references to be generated, one row for each prompt and seed."""
    size = settings.width, settings.height
    cond = pipe.condition(list(prompts), settings.guidance, **steering(settings))
    levels = pipe.schedule(settings.num_steps, *size)
    return Source(list(prompts), settings, levels, cond, pipe.noise(list(seeds), *size))


def photo_source(
    pipe: Pipeline,
    settings: EditSettings,
    prompts: Sequence[str],
    clean: Tensor,
    photo: Photograph | None = None,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Source:
    """Inverts photographs, one row each. With inversion "none" edits start at their latents.

    Args:
        pipe: the models.
        settings: complete settings of the edits.
        prompts: what each photograph shows.
        clean: latents of the photographs, "B I 64".
        photo: the photograph itself, if edits are to be put back into it.
        on_step: called with each step of the inversion, its number and how many steps reference and
            inversion have. An exception from it ends the run.
        progress: whether to show a progress bar.
    """
    levels = pipe.schedule(settings.num_steps, settings.width, settings.height)
    inversion_free = settings.inversion == "none" and not settings.as_published
    guidance = FLOW_EDIT_GUIDANCE if inversion_free else 1.0
    cond = pipe.condition(list(prompts), guidance, **steering(settings))
    if inversion_free:
        return Source(list(prompts), settings, levels, cond, clean, photo=photo, inversion_free=True)
    path, scale = replayed(pipe, settings, cond, clean, levels, on_step, progress)
    return Source(list(prompts), settings, levels, cond, path[0], path, scale, photo)


def replayed(
    pipe: Pipeline,
    settings: EditSettings,
    cond: Conditioning,
    clean: Tensor,
    levels: Sequence[float],
    on_step: OnStep | None = None,
    progress: bool = False,
) -> tuple[list[Tensor], float]:
    """The path from noise to these latents of photographs, "B I 64", that their references replay, and what
    its latents are divided by before they are decoded.
    """
    method = "euler" if settings.as_published else settings.inversion
    nudging = settings.nudging or (NUDGING if method == "euler" else 1.0)
    ids, plain = pipe.image_ids(1, settings.width, settings.height), replace(cond, negative=None)
    path = [nudging * clean]
    with pipe.denoising() as model:
        plain = plain.scheduled(model, levels[:-1])
        climb = INVERSIONS[method](model, path[0], ids, plain, levels)
        for index, latent in enumerate(_bar(climb, "inversion", len(levels) - 1, progress)):
            if on_step:
                t, noisier = levels[-1 - index], levels[-2 - index]
                velocity = (latent - path[0]) / (noisier - t)
                on_step(Step(noisier, t, latent, velocity, {}), index, 2 * (len(levels) - 1))
            path.insert(0, latent)
    if settings.as_published:
        # What the public code replays: after step i it replaces the latent by the one of two levels
        # before, after the first by the cleanest noisy one; and what was nudged is decoded as it is.
        path, nudging = [path[0], path[-2], *path[:-2]], 1.0
    return path, nudging


def steering(settings: EditSettings) -> dict:
    names = ("true_cfg", "negative_prompt", "mimic_scale", "mimic_percentile")
    return {name: getattr(settings, name) for name in names}


def _bar(steps: Iterator, what: str, total: int, progress: bool) -> Iterator:
    return iter(tqdm(steps, desc=what, total=total, unit="step", disable=not progress))
