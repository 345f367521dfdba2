"""From a photograph's latent to noise: the ODE of sampling run backwards, by several methods; and FlowEdit,
which does without.

An inversion is a generator. From the latent at timesteps[-1] (0, clean) it yields those at timesteps[-2],
..., timesteps[0] (1, noise), each as soon as it is known. In the formulae z_i is the latent at the noise
level t_i, i counted from the clean end, d = t_(i+1) - t_i, and v(z, t) the model's velocity.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from flux.model import Flux
from flux.sampling import Conditioning, euler_step

FIXED_POINT_ROUNDS = 4


def _velocity(model: Flux, latent: Tensor, img_ids: Tensor, cond: Conditioning, t: float) -> Tensor:
    return euler_step(model, latent, img_ids, cond, t, 0.0).velocity


def euler(
    model: Flux, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """Euler's method backwards (Stable Flow, arXiv 2411.14430, equation 4):

        z_(i+1) = z_i + d v(z_i, t_(i+1))

    First order, one evaluation a step, asked at the noisier level for the cleaner latent.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        latent = latent + (noisier - t) * _velocity(model, latent, img_ids, cond, noisier)
        yield latent


def midpoint(
    model: Flux, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """RF-Solver (arXiv 2411.04746, equations 8 and 9), whose derivative is a difference over half a step:

        z_(i+1) = z_i + d v(z_i, t_i) + d^2 / 2 * (v(z_i + d/2 v(z_i, t_i), t_i + d/2) - v(z_i, t_i)) / (d/2)
                = z_i + d v(z_i + d/2 v(z_i, t_i), t_i + d/2)

    Second order, two evaluations a step.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        d = noisier - t
        half = latent + d / 2 * _velocity(model, latent, img_ids, cond, t)
        latent = latent + d * _velocity(model, half, img_ids, cond, t + d / 2)
        yield latent


def fireflow(
    model: Flux, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """FireFlow (arXiv 2412.07517, section 4): the midpoint method, whose first velocity of a step is the
    midpoint's of the step before:

        m_i = v(z_i + d/2 m_(i-1), t_i + d/2), m_(-1) = v(z_0, t_0)
        z_(i+1) = z_i + d m_i

    Second order, one evaluation a step and one more at the start.
    """
    velocity = _velocity(model, latent, img_ids, cond, timesteps[-1])
    for t, noisier in pairwise(timesteps[::-1]):
        d = noisier - t
        velocity = _velocity(model, latent + d / 2 * velocity, img_ids, cond, t + d / 2)
        latent = latent + d * velocity
        yield latent


def fixed_point(
    model: Flux, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """The latent from which one Euler step down leads back (AIDI, arXiv 2309.04907, section 3.2), by
    iteration from equation 4's:

        z_(i+1) = z_i + d v(z_(i+1), t_(i+1))

    `FIXED_POINT_ROUNDS` evaluations a step; exact for plain sampling as far as they converge.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        guess = latent
        for _ in range(FIXED_POINT_ROUNDS):
            guess = latent + (noisier - t) * _velocity(model, guess, img_ids, cond, noisier)
        latent = guess
        yield latent


INVERSIONS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "euler": euler,
    "midpoint": midpoint,
    "fireflow": fireflow,
    "fixed-point": fixed_point,
}
