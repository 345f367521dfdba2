"""The path between noise and latent: start noise, packing, schedule, Euler steps down and back up.

A latent is "B 16 h w" with h and w an eighth of the picture's sides; packed, 2x2 places make one token: "B I
64".
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat

import torch
from einops import rearrange
from einops import repeat as tile
from torch import Tensor

from flux.errors import InputError
from flux.intervention import NOTHING, Intervention
from flux.math import KeysValues
from flux.model import Flux, Streams
from flux.modules.step_cache import StepCache


def latent_size(height: int, width: int) -> tuple[int, int]:
    """Sides of the latent of a picture of that size in pixels, rounded up to whole tokens."""
    return 2 * math.ceil(height / 16), 2 * math.ceil(width / 16)


def get_noise(
    num_samples: int, height: int, width: int, device: torch.device | str, dtype: torch.dtype, seed: int
) -> Tensor:
    """Start noise "num_samples 16 h w" for pictures of that size in pixels. Drawn on the CPU: equal on every
    device.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(num_samples, 16, *latent_size(height, width), dtype=dtype, generator=generator).to(
        device
    )


def pack(latent: Tensor) -> Tensor:
    """ "B c h w" -> tokens of 2x2 places, "B I 4c"."""
    return rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(x: Tensor, height: int, width: int) -> Tensor:
    """Back from tokens, "B I 4c", to the latent "B c h w" of a picture of that size in pixels."""
    return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=math.ceil(height / 16), ph=2, pw=2)


def image_ids(batch: int, height: int, width: int, device: torch.device | str) -> Tensor:
    """Positions (0, row, column) of a picture's tokens, "B I 3", float32. The size is the picture's, in
    pixels.
    """
    rows, columns = (side // 2 for side in latent_size(height, width))
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    return tile(ids, "i axes -> b i axes", b=batch).to(device)


def prepare(t5: Callable, clip: Callable, img: Tensor, prompt: str | list[str]) -> dict[str, Tensor]:
    """Everything `denoise` needs: the packed latent, the texts' features and the positions of both.

    One prompt serves all rows of `img` ("B 16 h w"), one row serves all prompts.
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
    """Noise levels moved towards the noisy end by exp(mu) (arXiv 2403.03206, section 5.3.2)."""
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
    """The num_steps + 1 noise levels from 1 to 0; more image tokens stay longer at the noisy end, unless not
    shifted.
    """
    levels = torch.linspace(1, 0, num_steps + 1)
    if shift:
        levels = time_shift(get_lin_function(y1=base_shift, y2=max_shift)(image_seq_len), 1.0, levels)
    return levels.tolist()


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What steers the rows of a batch.

    Attributes:
        txt: T5 features, "B T features"; txt_ids their positions, "B T 3".
        vec: pooled CLIP features, "B features".
        guidance: distilled guidance scale of each row, "B"; None for models without.
        negative: steers the second pass of true classifier-free guidance; None: there is none.
        true_cfg: scale of that guidance, 1 or more.
        mimic_scale: bring what true guidance gives down to the range that this smaller scale would have, see
            `guided`; None: as it is.
        mimic_percentile: the share of values, 0..1, that this range holds at least.
        mods: by noise level, what `flux.model.Flux.modulations` makes of it and these rows, or of one of them
            that stands for all; see `scheduled`.
    """

    txt: Tensor
    txt_ids: Tensor
    vec: Tensor
    guidance: Tensor | None = None
    negative: "Conditioning | None" = None
    true_cfg: float = 1.0
    mimic_scale: float | None = None
    mimic_percentile: float = 0.995
    mods: Mapping[float, list[Tensor]] = field(default_factory=dict)

    def scheduled(self, model: Flux, timesteps: Iterable[float]) -> "Conditioning":
        """With the modulations of all these noise levels worked out at once, so that no step does it.

        Rows of the same prompt and guidance share them. With a negative pass, whose rows come and go with the
        steps, nothing is worked out. For this model only: leave the result where the model is at work.
        """
        levels = [t for t in dict.fromkeys(timesteps) if t not in self.mods]
        if self.negative is not None or not levels:
            return self
        rows = [self.vec] if self.guidance is None else [self.vec, self.guidance]
        if all(bool((x == x[:1]).all()) for x in rows):
            rows = [x[:1] for x in rows]
        t = torch.tensor(levels, dtype=self.vec.dtype, device=self.vec.device)
        made = model.modulations(
            t.repeat_interleave(len(rows[0])), *(x.repeat(len(levels), *[1] * (x.ndim - 1)) for x in rows)
        )
        by_level = zip(*(x.split(len(rows[0])) for x in made))
        return replace(self, mods={**self.mods, **dict(zip(levels, map(list, by_level)))})

    def expanded(self, batch: int) -> "Conditioning":
        """One row made to steer the whole batch."""
        txt, txt_ids = (x.expand(batch, -1, -1) for x in (self.txt, self.txt_ids))
        guidance = None if self.guidance is None else self.guidance.expand(batch)
        negative = self.negative and self.negative.expanded(batch)
        rows = {"txt": txt, "txt_ids": txt_ids, "vec": self.vec.expand(batch, -1), "guidance": guidance}
        return replace(self, **rows, negative=negative)

    def with_negative(self) -> "Conditioning":
        """Both passes as one batch: these rows, then those of the negative pass."""

        def both(name: str) -> Tensor | None:
            own = getattr(self, name)
            return None if own is None else torch.cat((own, getattr(self.negative, name)))

        return Conditioning(*map(both, ("txt", "txt_ids", "vec", "guidance")))


@dataclass(frozen=True, eq=False)
class Step:
    """One Euler step from noise level `t` to `t_next`; latents packed, "B I 64".

    Attributes:
        noisy: the latent that entered.
        velocity: the model's answer to it.
        kept: image keys and values of the layers the intervention kept; kept_negative: those of the negative
            pass.
        watched: queries and keys of the layers the intervention watched.
    """

    t: float
    t_next: float
    noisy: Tensor
    velocity: Tensor
    kept: dict[int, KeysValues]
    kept_negative: dict[int, KeysValues] | None = None
    watched: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def latent(self) -> Tensor:
        """The latent at `t_next`."""
        return self.noisy + (self.t_next - self.t) * self.velocity

    @property
    def clean(self) -> Tensor:
        """The clean latent that this velocity points at."""
        return self.noisy - self.t * self.velocity


def noise_levels(t: float, img: Tensor) -> Tensor:
    """The same noise level for all rows, "B"."""
    return torch.full((img.shape[0],), t, dtype=img.dtype, device=img.device)


def streams(
    model: Flux, img: Tensor, img_ids: Tensor, cond: Conditioning, t: float
) -> list[tuple[Streams, Streams | None]]:
    """What enters each layer at noise level t, in the pass itself and in the negative one, if any."""

    def of_pass(cond: Conditioning) -> list[Streams]:
        ids = (img_ids, cond.txt, cond.txt_ids)
        given = (noise_levels(t, img), cond.vec, cond.guidance)
        return model.streams(img, *ids, *given, mods=cond.mods.get(t))

    own = of_pass(cond)
    return list(zip(own, of_pass(cond.negative) if cond.negative else [None] * len(own)))


def euler_step(
    model: Flux,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    t: float,
    t_next: float,
    intervention: Intervention = NOTHING,
    start: tuple[Streams | None, Streams | None] = (None, None),
    cache: StepCache | None = None,
) -> Step:
    """One step of Euler's method from the packed latent `img` ("B I 64") at noise level t to t_next.

    Args:
        img_ids: positions of the image tokens, the same in all rows, "B I 3" or "1 I 3".
        start: streams to begin with instead of at layer 0, in the pass itself and in the negative one; see
            `streams`.
        cache: see `sample`; not used with a negative pass.
    """

    # The negative pass would need one of its own.
    used = None if cond.negative else cache

    def ask(img: Tensor, cond: Conditioning, intervention: Intervention, start: Streams | None):
        ids = (img_ids[:1].expand(img.shape[0], -1, -1), cond.txt, cond.txt_ids)
        given = (noise_levels(t, img), cond.vec, cond.guidance)
        return model.observe(img, *ids, *given, intervention, start, cond.mods.get(t), used)

    if cond.negative is None:
        velocity, found = ask(img, cond, intervention, start[0])
        return Step(t, t_next, img, velocity, found.kept, None, found.watched)
    batch = img.shape[0]
    if in_one_batch(img):
        first = start[0] and start[0].stacked(start[1], batch)
        both = (cond.with_negative(), intervention.of_both_passes(), first)
        velocities, found = ask(img.repeat(2, 1, 1), *both)
        velocity, away = velocities.chunk(2)
        kept, kept_negative = (
            {layer: (k[rows], v[rows]) for layer, (k, v) in found.kept.items()}
            for rows in (slice(batch), slice(batch, None))
        )
        watched = {layer: (q[:batch], k[:batch]) for layer, (q, k) in found.watched.items()}
    else:
        velocity, found = ask(img, cond, intervention, start[0])
        away, found_negative = ask(img, cond.negative, intervention.of_negative_pass(), start[1])
        kept, kept_negative, watched = found.kept, found_negative.kept, found.watched
    return Step(t, t_next, img, guided(img, t, velocity, away, cond), kept, kept_negative, watched)


ONE_BATCH = 2**14  # image tokens of both passes, those of four pictures of 1024x1024


def in_one_batch(img: Tensor) -> bool:
    """Whether both passes of true guidance go through the model as one batch.

    On a GPU, where two small batches take longer than one, up to `ONE_BATCH` image tokens. That is a fixed
    number, and not what memory happens to be free, so that a run repeats bit for bit.
    """
    return img.device.type != "cpu" and 2 * img.shape[0] * img.shape[1] <= ONE_BATCH


def guided(img: Tensor, t: float, velocity: Tensor, away: Tensor, cond: Conditioning) -> Tensor:
    """The velocity of true guidance at noise level t, "B I 64".

    With a `mimic_scale`, dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3, as ComfyUI's and
    AUTOMATIC1111's users know it by mcmonkey4eva's "mimic scale"). With x(s) = img - t (away + s (velocity -
    away)), the clean latent that guidance of scale s points at, and x' its deviation from the mean over its
    image tokens, each row and channel by itself:

        M = max |x'(mimic_scale)|, P = the percentile of |x'(true_cfg)|, S = max(M, P)
        x = mean of x(true_cfg) + M / S * clamp(x'(true_cfg), -S, S)
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
    model: Flux,
    img: Tensor,
    img_ids: Tensor,
    cond: Conditioning,
    timesteps: Sequence[float],
    interventions: Intervention | Iterable[Intervention] = NOTHING,
    cache: StepCache | None = None,
) -> Iterator[Step]:
    """Euler's method, step by step: yields each of the len(timesteps) - 1 steps as soon as it is taken.

    Args:
        img: packed latent at noise level timesteps[0], "B I 64".
        interventions: one for all steps, or one for each; asked for only when its step begins, so that it may
            come from another sampling that runs beside this one.
        cache: spares steps that change little most of their work; a new one for each sampling.

    Raises:
        ValueError: fewer interventions than steps.
    """
    each = repeat(interventions) if isinstance(interventions, Intervention) else iter(interventions)
    cond = cond.scheduled(model, timesteps[:-1])
    for t, t_next in zip(timesteps, timesteps[1:]):
        intervention = next(each, None)
        if intervention is None:
            raise ValueError(f"Got too few interventions for {len(timesteps) - 1} steps: give one for each")
        step = euler_step(model, img, img_ids, cond, t, t_next, intervention, cache=cache)
        img = step.latent
        yield step


def denoise(
    model: Flux,
    img: Tensor,
    img_ids: Tensor,
    txt: Tensor,
    txt_ids: Tensor,
    vec: Tensor,
    timesteps: Sequence[float],
    guidance: float = 4.0,
    interventions: Intervention | Iterable[Intervention] = NOTHING,
) -> Tensor:
    """The packed latent at the last of `timesteps`, "B I 64": upstream's call, with interventions."""
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
    """The steps that lie in the fractions start..stop of a schedule, at least one of them.

    Raises:
        InputError: if no step does.
    """
    steps = range(step_at(start, num_steps), step_at(stop, num_steps))
    if not steps:
        raise InputError(
            f"Got {num_steps} steps, none of which lies in {start:g}..{stop:g} of them, where keys and "
            "values are taken over: give more num_steps, or inject_from and inject_until that hold one"
        )
    return steps
