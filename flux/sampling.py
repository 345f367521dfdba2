"""The path between noise and latent: start noise, packing, schedule, Euler steps, guidance.

A latent is "B 16 h w" with h and w an eighth of the image's sides. Packed, 2x2 of its places make one token:
"B I 64".
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, pairwise, repeat
from typing import Generic, TypeVar

import torch
from einops import rearrange
from einops import repeat as tile
from torch import Tensor

from flux.errors import InputError
from flux.intervention import NOTHING, Intervention, Recorded
from flux.math import KeysValues
from flux.model import Inputs, Streams, VelocityModel
from flux.modules.step_cache import StepCache


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Sides of the latent of an image of that size in pixels, rounded up to whole tokens."""
    return 2 * math.ceil(height / 16), 2 * math.ceil(width / 16)


def get_noise(
    num_samples: int, height: int, width: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Tensor:
    """Draw start noise, "num_samples 16 h w", on the CPU, so that it is the same on every device.

    Args:
        num_samples: Number of images.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        device: Device of the result.
        dtype: Dtype in which the noise is drawn.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = num_samples, 16, *latent_size(height, width)
    return torch.randn(shape, dtype=dtype, generator=generator).to(device)


def pack(latent: Tensor) -> Tensor:
    """Pack 2x2 places to one token: "B c h w" -> "B I 4c"."""
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:  # noqa: ARG001  (upstream's call)
    """Unpack the tokens of an image of that size in pixels: "B I 4c" -> "B c h w"."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=math.ceil(height / 16), ph=2, pw=2)


def image_ids(batch: int, height: int, width: int, device: torch.device | str) -> Tensor:
    """Positions (0, row, column) of the tokens of an image of that size in pixels, "B I 3", float32."""
    rows, columns = (side // 2 for side in latent_size(height, width))
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return tile(ids, "i axes -> b i axes", b=batch).to(device)


def prepare(t5: Callable, clip: Callable, img: Tensor, prompt: str | list[str]) -> dict[str, Tensor]:
    """Make everything that `denoise` needs: the packed latent, the texts' features, the positions of both.

    Args:
        t5: Encodes prompts to "B T features".
        clip: Encodes prompts to "B features".
        img: Latent, "B 16 h w". A single row serves all prompts.
        prompt: One for each row, or one that serves all rows.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if img.shape[0] == 1:
        img = img.expand(len(prompts), -1, -1, -1)
    batch, _, height, width = img.shape
    txt, vec = t5(prompts), clip(prompts)
    if len(prompts) == 1:
        txt, vec = txt.expand(batch, -1, -1), vec.expand(batch, -1)
    return {
        "img": pack(img),
        "img_ids": image_ids(batch, 8 * height, 8 * width, img.device),
        "txt": txt.to(img.device),
        "txt_ids": torch.zeros(batch, txt.shape[1], 3, device=img.device),
        "vec": vec.to(img.device),
    }


def time_shift(mu: float, sigma: float, t: Tensor) -> Tensor:
    """Move noise levels towards the noisy end by exp(mu) (arXiv 2403.03206, section 5.3.2)."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def get_lin_function(
    x1: float = 256, y1: float = 0.5, x2: float = 4096, y2: float = 1.15
) -> Callable[[float], float]:
    """The straight line through (x1, y1) and (x2, y2)."""
    slope = (y2 - y1) / (x2 - x1)
    return lambda x: y1 + slope * (x - x1)


def get_schedule(
    num_steps: int, image_seq_len: int, base_shift: float = 0.5, max_shift: float = 1.15, shift: bool = True
) -> list[float]:
    """The num_steps + 1 noise levels from 1 to 0.

    Args:
        num_steps: Number of steps.
        image_seq_len: Number of image tokens.
        base_shift: Shift towards the noisy end, `mu` of `time_shift`, for 256 image tokens.
        max_shift: The same for 4096 image tokens.
        shift: Whether levels are shifted; otherwise they are evenly spaced.
    """
    levels = torch.linspace(1, 0, num_steps + 1)
    if shift:
        levels = time_shift(get_lin_function(y1=base_shift, y2=max_shift)(image_seq_len), 1.0, levels)
    return levels.tolist()


@dataclass(frozen=True, eq=False)
class Modulations:
    """The modulations of all layers in each step of a schedule.

    Attributes:
        levels: Noise level of each step.
        layers: What `flux.model.Flux.modulations` returns for all of them, one tensor for each layer, "S R
            channels": S steps, R rows of the batch, or a single row that stands for all of them.
    """

    levels: tuple[float, ...]
    layers: list[Tensor]

    @classmethod
    def of(cls, model: VelocityModel, levels: Sequence[float], cond: "Conditioning") -> "Modulations":
        """Compute them in one go. Rows with the same prompt and guidance share one row."""
        rows = [cond.vec] if cond.guidance is None else [cond.vec, cond.guidance]
        if all(bool((x == x[:1]).all()) for x in rows):
            rows = [x[:1] for x in rows]
        steps, count = len(levels), len(rows[0])
        t = torch.tensor(levels, dtype=cond.vec.dtype, device=cond.vec.device).repeat_interleave(count)
        made = model.modulations(t, *(x.repeat(steps, *[1] * (x.ndim - 1)) for x in rows))
        return cls(tuple(levels), [x.unflatten(0, (steps, count)) for x in made])

    def at_rows(self, rows: Sequence[int]) -> "Modulations":
        """Those of some rows."""
        return replace(self, layers=[x if x.shape[1] == 1 else x[:, rows] for x in self.layers])

    def at(self, t: float) -> list[Tensor] | None:
        """Each layer's modulations in the step at noise level t. None if it is not of this schedule."""
        if t not in self.levels:
            return None
        step = self.levels.index(t)
        return [layer[step] for layer in self.layers]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The prompts and guidance that steer the rows of a batch.

    Attributes:
        txt: T5 features, "B T features".
        txt_ids: Positions of the text tokens, "B T 3".
        vec: Pooled CLIP features, "B features".
        guidance: Distilled guidance scale of each row, "B". None for models without.
        negative: Steers the second pass of true classifier-free guidance. If None, there is no such pass.
        true_cfg: Scale of true guidance, 1 or more.
        mimic_scale: Smaller scale to whose range the result of true guidance is brought down, see `guided`.
            If None, it stays as it is.
        mimic_percentile: Share of values, 0..1, that this range holds at least.
        modulations: Modulations that were computed in advance, see `scheduled`.
    """

    txt: Tensor
    txt_ids: Tensor
    vec: Tensor
    guidance: Tensor | None = None
    negative: "Conditioning | None" = None
    true_cfg: float = 1.0
    mimic_scale: float | None = None
    mimic_percentile: float = 0.995
    modulations: Modulations | None = None

    def scheduled(self, model: VelocityModel, timesteps: Sequence[float]) -> "Conditioning":
        """The same with the modulations at all these noise levels, so that no step computes its own.

        With a negative pass, which may begin in a later step, the conditioning is returned as it is. The
        result is for this model only; do not move it to another device.
        """
        known = () if self.modulations is None else self.modulations.levels
        if self.negative is not None or all(t in known for t in timesteps):
            return self
        return replace(self, modulations=Modulations.of(model, timesteps, self))

    def expanded(self, batch: int) -> "Conditioning":
        """Expand a single row to the whole batch."""
        return replace(
            self,
            txt=self.txt.expand(batch, -1, -1),
            txt_ids=self.txt_ids.expand(batch, -1, -1),
            vec=self.vec.expand(batch, -1),
            guidance=None if self.guidance is None else self.guidance.expand(batch),
            negative=None if self.negative is None else self.negative.expanded(batch),
        )

    def at_rows(self, rows: Sequence[int]) -> "Conditioning":
        """The conditioning of some rows."""
        rows = list(rows)
        return replace(
            self,
            txt=self.txt[rows],
            txt_ids=self.txt_ids[rows],
            vec=self.vec[rows],
            guidance=None if self.guidance is None else self.guidance[rows],
            negative=None if self.negative is None else self.negative.at_rows(rows),
            modulations=None if self.modulations is None else self.modulations.at_rows(rows),
        )

    def stacked(self, other: "Conditioning") -> "Conditioning":
        """These rows, then those of `other`, as one batch of a single pass."""
        guidance = None
        if self.guidance is not None and other.guidance is not None:
            guidance = torch.cat((self.guidance, other.guidance))
        txt, txt_ids = torch.cat((self.txt, other.txt)), torch.cat((self.txt_ids, other.txt_ids))
        return Conditioning(txt, txt_ids, torch.cat((self.vec, other.vec)), guidance)


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Passes(Generic[T]):
    """One value for each pass of a step.

    Attributes:
        positive: The value of the prompt's pass.
        negative: The value of the negative prompt's pass, the second one of true guidance. If None, there is
            no such pass.
    """

    positive: T
    negative: T | None = None

    def __iter__(self) -> Iterator[T]:
        yield self.positive
        if self.negative is not None:
            yield self.negative

    def map(self, function: Callable[[T], U]) -> "Passes[U]":
        """The results of `function` for the value of each pass."""
        return Passes(*map(function, self))


@dataclass(frozen=True, eq=False)
class Step:
    """One Euler step from noise level `t` to `t_next`.

    Attributes:
        t: Noise level at the start.
        t_next: Noise level at the end.
        noisy: Packed latent at `t`, "B I 64".
        velocity: The model's answer to it, "B I 64".
        kept: Image keys and values of the layers that the intervention kept, for each pass.
        watched: Queries and keys of the layers that the intervention watched.
    """

    t: float
    t_next: float
    noisy: Tensor
    velocity: Tensor
    kept: Passes[dict[int, KeysValues]] = field(default_factory=lambda: Passes({}))
    watched: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
    return Inputs(img, ids, cond.txt, cond.txt_ids, levels, cond.vec, cond.guidance)


def _modulations_at(cond: Conditioning, t: float) -> list[Tensor] | None:
    return cond.modulations.at(t) if cond.modulations else None


def streams(
    model: VelocityModel, img: Tensor, img_ids: Tensor, cond: Conditioning, t: float
) -> list[Passes[Streams]]:
    """The streams into each layer at noise level t, for each pass."""
    passes = Passes(cond, cond.negative).map(
        lambda cond: model.streams(model_inputs(img, img_ids, cond, t), _modulations_at(cond, t))
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
) -> Step:
    """One step of Euler's method from the packed latent `img` at noise level t to t_next.

    Args:
        model: The transformer.
        img: Packed latent, "B I 64".
        img_ids: Positions of the image tokens, the same in all rows, "B I 3" or "1 I 3".
        cond: Prompts and guidance.
        t: Noise level of `img`.
        t_next: Noise level to go to.
        intervention: One for both passes, or one for each. If one for both watches, only the prompt's pass
            is watched.
        start: Streams to begin with instead of at layer 0, see `streams`.
        cache: See `sample`. Not used with a negative pass.
    """

    def observe(
        img: Tensor,
        cond: Conditioning,
        intervention: Intervention,
        start: Streams | None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, Recorded]:
        inputs, mods = model_inputs(img, img_ids, cond, t), _modulations_at(cond, t)
        return model.observe(inputs, intervention, start=start, mods=mods, cache=cache)

    each = intervention if isinstance(intervention, Passes) else Passes(intervention)
    first, second = (start.positive, start.negative) if start else (None, None)
    if cond.negative is None:
        velocity, found = observe(img, cond, each.positive, first, cache)
        return Step(t, t_next, img, velocity, Passes(found.kept), found.watched)

    other = each.negative or replace(each.positive, watch=frozenset())
    if in_one_batch(img) and each.positive.free is None:
        batch = img.shape[0]
        if first and second:
            first = first.expanded(batch).stacked(second.expanded(batch))
        conds, interventions = cond.stacked(cond.negative), each.positive.stacked(other)
        velocities, found = observe(img.repeat(2, 1, 1), conds, interventions, first)
        velocity, away = velocities.chunk(2)
        found, found_negative = found.rows(slice(batch)), found.rows(slice(batch, None))
    else:
        velocity, found = observe(img, cond, each.positive, first)
        away, found_negative = observe(img, cond.negative, other, second)
    kept = Passes(found.kept, found_negative.kept)
    return Step(t, t_next, img, guided(img, t, velocity, away, cond), kept, found.watched)


ONE_BATCH = 2**14  # image tokens of both passes, those of four images of 1024x1024


def in_one_batch(img: Tensor) -> bool:
    """Whether both passes of true guidance go through the model as one batch.

    On a GPU, where two small batches take longer than one, up to `ONE_BATCH` image tokens. The limit is a
    constant, not the free memory, so that runs repeat bit for bit.
    """
    return img.device.type != "cpu" and 2 * img.shape[0] * img.shape[1] <= ONE_BATCH


def guided(img: Tensor, t: float, velocity: Tensor, away: Tensor, cond: Conditioning) -> Tensor:
    """The velocity of true classifier-free guidance at noise level t, "B I 64".

    With a `mimic_scale`, by dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3; known from
    mcmonkey4eva's "mimic scale" for ComfyUI and AUTOMATIC1111). With x(s) = img - t (away + s (velocity -
    away)), the clean latent that guidance of scale s points at, and x' its deviation from the mean over the
    image tokens, of each row and channel:

        M = max |x'(mimic_scale)|, P = the percentile of |x'(true_cfg)|, S = max(M, P)
        x = mean of x(true_cfg) + M / S * clamp(x'(true_cfg), -S, S)

    Args:
        img: Noisy latent, "B I 64".
        t: Its noise level.
        velocity: Velocity of the prompt's pass, "B I 64".
        away: Velocity of the negative prompt's pass, "B I 64".
        cond: Has the scales.
    """

    def of_scale(scale: float) -> Tensor:
        return away + scale * (velocity - away)

    if cond.mimic_scale is None:
        return of_scale(cond.true_cfg)
    full, mimic = ((img - t * of_scale(scale)).float() for scale in (cond.true_cfg, cond.mimic_scale))
    mean = full.mean(dim=1, keepdim=True)
    own_range = (mimic - mimic.mean(dim=1, keepdim=True)).abs().amax(dim=1, keepdim=True)
    percentile = torch.quantile((full - mean).abs(), cond.mimic_percentile, dim=1, keepdim=True)
    bound = torch.maximum(own_range, percentile).clamp(min=1e-8)
    clean = mean + own_range / bound * (full - mean).clamp(-bound, bound)
    return ((img.float() - clean) / t).to(img)


def sample(
    model: VelocityModel,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    timesteps: Sequence[float],
    interventions: Intervention | Iterable[Intervention | Passes[Intervention]] = NOTHING,
    cache: StepCache | None = None,
) -> Iterator[Step]:
    """Take the steps of Euler's method: yield each of the len(timesteps) - 1 steps as soon as it is taken.

    Args:
        model: The transformer.
        img: Packed latent at noise level timesteps[0], "B I 64".
        img_ids: Positions of the image tokens, "B I 3" or "1 I 3".
        cond: Prompts and guidance.
        timesteps: Noise levels, falling.
        interventions: One for all steps, or one for each. A step's own is asked for only when the step
            begins, so that it may come from another sampling that runs beside this one.
        cache: Spares steps that change little most of their work. Give a new one to each sampling.

    Raises:
        ValueError: There are fewer interventions than steps.
    """
    each = repeat(interventions) if isinstance(interventions, Intervention) else iter(interventions)
    cond = cond.scheduled(model, timesteps[:-1])
    for t, t_next in pairwise(timesteps):
        intervention = next(each, None)
        if intervention is None:
            raise ValueError(f"Got too few interventions for {len(timesteps) - 1} steps: give one for each")
        step = euler_step(model, img, img_ids, cond, t, t_next, intervention, cache=cache)
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
    interventions: Intervention | Iterable[Intervention | Passes[Intervention]] = NOTHING,
) -> Tensor:
    """Sample: the packed latent at the last of `timesteps`, "B I 64". Upstream's call, with interventions.

    Args:
        model: The transformer.
        img: Packed latent at noise level timesteps[0], "B I 64".
        img_ids: Positions of the image tokens, "B I 3".
        txt: T5 features, "B T features".
        txt_ids: Positions of the text tokens, "B T 3".
        vec: Pooled CLIP features, "B features".
        timesteps: Noise levels, falling.
        guidance: Distilled guidance scale.
        interventions: One for all steps, or one for each.
    """
    cond = Conditioning(
        txt, txt_ids, vec, torch.full((img.shape[0],), guidance, device=img.device, dtype=img.dtype)
    )
    for step in sample(model, img, img_ids, cond, timesteps, interventions):
        img = step.latent
    return img


def step_at(fraction: float, num_steps: int) -> int:
    """The step that begins nearest to that fraction of all steps, the later one of two equally near."""
    return math.floor(fraction * num_steps + 0.5)


def window(num_steps: int, start: float, stop: float) -> range:
    """The steps within the fractions start..stop of a schedule, at least one.

    Raises:
        InputError: No step is.
    """
    steps = range(step_at(start, num_steps), step_at(stop, num_steps))
    if start >= stop:
        got = f"Got inject_from {start:g} and inject_until {stop:g}"
        raise InputError(f"{got}, expected inject_from to be smaller")
    if not steps:
        enough = next(n for n in count(num_steps) if step_at(start, n) < step_at(stop, n))
        got = f"Got {num_steps} step{'s' * (num_steps != 1)}"
        raise InputError(
            f"{got}, none of which lies in {start:g}..{stop:g} of them, "
            f"where this dose injects keys and values: give num_steps {enough} or more, or another dose"
        )
    return steps
