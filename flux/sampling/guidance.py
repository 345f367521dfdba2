"""True classifier-free guidance: two passes a step, and the velocity of both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flux.sampling.conditioning import Conditioning

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
