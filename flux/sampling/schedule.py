"""The noise levels of a schedule, and parts of it."""

import math
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from flux.errors import InputError


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
