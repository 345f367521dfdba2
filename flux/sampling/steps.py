"""Euler steps from noise to latent."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, repeat

import torch
from torch import Tensor

from flux.errors import InputError
from flux.inputs import Condition, Inputs, Streams
from flux.intervention import NOTHING, Intervention, Recorded
from flux.math import KeysValues, Parts
from flux.model import VelocityModel
from flux.modules.step_cache import StepCache
from flux.sampling.conditioning import Conditioning
from flux.sampling.context import ContextReuse
from flux.sampling.guidance import Passes, guided, in_one_batch


@dataclass(frozen=True, eq=False)
class Step:
    """One Euler step from noise level `t` to `t_next`.

    Attributes:
        t: Noise level at the start.
        t_next: Noise level at the end.
        noisy: Packed latent at `t`, "B I 64".
        velocity: The model's answer to it, "B I 64".
        kept: Image keys, values and queries of the layers that the intervention kept, for each pass.
        watched: Queries and keys of the layers that the intervention watched.
        context: The context tokens' keys and values, if the intervention kept them, for each pass.
    """

    t: float
    t_next: float
    noisy: Tensor
    velocity: Tensor
    kept: Passes[dict[int, Parts]] = field(default_factory=lambda: Passes({}))
    watched: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    context: Passes[dict[int, KeysValues]] = field(default_factory=lambda: Passes({}))

    @cached_property
    def latent(self) -> Tensor:
        """The latent at `t_next`."""
        return self.noisy + (self.t_next - self.t) * self.velocity

    @property
    def clean(self) -> Tensor:
        """The clean latent that this velocity points at."""
        return self.noisy - self.t * self.velocity


def model_inputs(img: Tensor, img_ids: Tensor, cond: Conditioning, t: float) -> Inputs:
    """The transformer's inputs for the latent `img` at noise level t, the same in all rows."""
    levels = torch.full((img.shape[0],), t, dtype=img.dtype, device=img.device)
    ids = img_ids[:1].expand(img.shape[0], -1, -1)
    return Inputs(img, ids, cond.txt, cond.txt_ids, levels, cond.vec, cond.guidance, cond.condition)


def streams(
    model: VelocityModel, img: Tensor, img_ids: Tensor, cond: Conditioning, t: float
) -> list[Passes[Streams]]:
    """The streams into each layer at noise level t, for each pass."""
    passes = Passes(cond, cond.negative).map(
        lambda cond: model.streams(model_inputs(img, img_ids, cond, t), cond.modulations_at(t))
    )
    return [Passes(*each) for each in zip(*passes)]


def euler_step(
    model: VelocityModel,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    t: float,
    t_next: float,
    intervention: Intervention | Passes[Intervention] = NOTHING,
    start: Passes[Streams] | None = None,
    cache: StepCache | None = None,
    context: ContextReuse | None = None,
) -> Step:
    """One step of Euler's method from the packed latent `img` at noise level t to t_next.

    Args:
        model: The transformer.
        img: Packed latent, "B I 64".
        img_ids: Positions of the noise tokens, the same in all rows, "B I 3" or "1 I 3".
        cond: Prompts and guidance.
        t: Noise level of `img`.
        t_next: Noise level to go to.
        intervention: One for both passes, or one for each. If one for both watches, only the prompt's pass
            is watched.
        start: Streams to begin with instead of at layer 0, see `streams`.
        cache: See `sample`. Not used with a negative pass.
        context: See `sample`. If None, the context tokens are computed.
    """
    if context is not None:
        context.begin_step()
    if cond.negative is not None:
        cache = None

    def observe(
        img: Tensor, cond: Conditioning, intervention: Intervention, start: Streams | None, number: int = 0
    ) -> tuple[Tensor, Recorded]:
        inputs, mods = model_inputs(img, img_ids, cond, t), cond.modulations_at(t)
        if context is None:
            return model.observe(inputs, intervention, start=start, mods=mods, cache=cache)
        return context.observe(model, inputs, intervention, number, start=start, mods=mods)

    each = intervention if isinstance(intervention, Passes) else Passes(intervention)
    starts = (start.positive, start.negative) if start else (None, None)
    if cond.negative is None:
        velocity, recorded = observe(img, cond, each.positive, starts[0])
        found = Passes(recorded)
    else:
        both = each.positive, each.negative or replace(each.positive, watch=frozenset())
        velocity, away, found = _both_passes(observe, img, (cond, cond.negative), both, starts)
        velocity = guided(img, t, velocity, away, cond)
    kept, of_context = found.map(lambda each: each.kept), found.map(lambda each: each.context)
    return Step(t, t_next, img, velocity, kept, found.positive.watched, of_context)


def _both_passes(
    observe: Callable[..., tuple[Tensor, Recorded]],
    img: Tensor,
    conds: tuple[Conditioning, Conditioning],
    interventions: tuple[Intervention, Intervention],
    starts: tuple[Streams | None, Streams | None],
) -> tuple[Tensor, Tensor, Passes[Recorded]]:
    """Take the prompt's pass and the negative one, as one batch if `in_one_batch` says so.

    Returns:
        The velocities of the two, "B I 64" each, and what they hand out.
    """
    first, second = starts
    if not in_one_batch(img) or interventions[0].free is not None:
        velocity, found = observe(img, conds[0], interventions[0], first)
        away, found_negative = observe(img, conds[1], interventions[1], second, number=1)
        return velocity, away, Passes(found, found_negative)
    batch = img.shape[0]
    if first and second:
        first = first.expanded(batch).stacked(second.expanded(batch))
    cond, intervention = conds[0].stacked(conds[1]), interventions[0].stacked(interventions[1])
    velocities, found = observe(img.repeat(2, 1, 1), cond, intervention, first)
    velocity, away = velocities.chunk(2)
    return velocity, away, Passes(found.rows(slice(batch)), found.rows(slice(batch, None)))


def sample(
    model: VelocityModel,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    timesteps: Sequence[float],
    interventions: Intervention | Iterable[Intervention | Passes[Intervention]] = NOTHING,
    cache: StepCache | None = None,
    context: ContextReuse | None = None,
) -> Iterator[Step]:
    """Take the steps of Euler's method: yield each of the len(timesteps) - 1 steps as soon as it is taken.

    Args:
        model: The transformer.
        img: Packed latent at noise level timesteps[0], "B I 64".
        img_ids: Positions of the noise tokens, "B I 3" or "1 I 3".
        cond: Prompts and guidance.
        timesteps: Noise levels, falling.
        interventions: One for all steps, or one for each. A step's own is asked for only when the step
            begins, so that it may come from another sampling that runs beside this one.
        cache: Spares steps that change little most of their work. Give a new one to each sampling.
        context: Reuses the context tokens' keys and values. Give a new one to each sampling. If None, there
            is one if `cond` asks for it.

    Raises:
        ValueError: There are fewer interventions than steps.
        InputError: There is a cache, and the context is reused.
    """
    each = repeat(interventions) if isinstance(interventions, Intervention) else iter(interventions)
    cond, context = cond.scheduled(model, timesteps[:-1]), context or ContextReuse.of(cond)
    if cache is not None and context is not None:
        raise InputError(
            "Got a cache and a context that is reused, which both spare parts of a step: give one"
        )
    for t, t_next in pairwise(timesteps):
        intervention = next(each, None)
        if intervention is None:
            raise ValueError(f"Got too few interventions for {len(timesteps) - 1} steps: give one for each")
        step = euler_step(model, img, img_ids, cond, t, t_next, intervention, cache=cache, context=context)
        img = step.latent
        yield step


def denoise(
    model: VelocityModel,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timesteps: Sequence[float],
    guidance: float = 4.0,
    img_cond: Tensor | None = None,
    img_cond_seq: Tensor | None = None,
    img_cond_seq_ids: Tensor | None = None,
    *,
    interventions: Intervention | Iterable[Intervention | Passes[Intervention]] = NOTHING,
) -> Tensor:
    """Sample: the packed latent at the last of `timesteps`, "B I 64". Upstream's call, with interventions.

    Args:
        model: The transformer.
        img: Packed latent at noise level timesteps[0], "B I 64".
        img_ids: Positions of the noise tokens, "B I 3".
        txt: T5 features, "B T features".
        txt_ids: Positions of the text tokens, "B T 3".
        vec: Pooled CLIP features, "B features".
        timesteps: Noise levels, falling.
        guidance: Distilled guidance scale.
        img_cond: Channels of a condition, "B I c".
        img_cond_seq: Tokens of a context image, "B J 64".
        img_cond_seq_ids: Their positions, "B J 3".
        interventions: One for all steps, or one for each.
    """
    scale = torch.full((img.shape[0],), guidance, device=img.device, dtype=img.dtype)
    condition = Condition(img_cond, img_cond_seq, img_cond_seq_ids)
    cond = Conditioning(txt, txt_ids, vec, scale).with_condition(condition)
    for step in sample(model, img, img_ids, cond, timesteps, interventions):
        img = step.latent
    return img
