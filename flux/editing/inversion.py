"""Inversion of a photograph's latent to noise: the ODE of sampling, solved backwards by several methods.

An inversion is a generator. It starts from the latent at timesteps[-1] (0, clean) and yields those at
timesteps[-2], ..., timesteps[0] (1, noise), each as soon as it is known. In the formulae, z_i is the latent
at noise level t_i, with i counted from the clean end, d = t_(i+1) - t_i, and v(z, t) is the model's velocity.

All have the same arguments: the model, the clean latents ("B I 64"), the positions of the image tokens
("B I 3"), the conditioning, and the descending noise levels.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from flux.sampling import Conditioning, VelocityModel, euler_step

FIXED_POINT_ROUNDS = 4


def velocity_at(
    model: VelocityModel, latent: Tensor, img_ids: Tensor, cond: Conditioning, t: float
) -> Tensor:
    """Evaluate the model: the velocity of the latents at noise level t, "B I 64"."""
    return euler_step(model, latent, img_ids, cond, t, 0.0).velocity


def euler(
    model: VelocityModel, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """Euler's method backwards (Stable Flow, arXiv 2411.14430, equation 4).

        z_(i+1) = z_i + d v(z_i, t_(i+1))

    First order, one evaluation a step: the cleaner latent at the noisier level.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        latent = latent + (noisier - t) * velocity_at(model, latent, img_ids, cond, noisier)
        yield latent


def midpoint(
    model: VelocityModel, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """RF-Solver (arXiv 2411.04746, equations 8 and 9), with the derivative as a difference over half a step.

        z_(i+1) = z_i + d v(z_i, t_i) + d^2 / 2 * (v(z_i + d/2 v(z_i, t_i), t_i + d/2) - v(z_i, t_i)) / (d/2)
                = z_i + d v(z_i + d/2 v(z_i, t_i), t_i + d/2)

    Second order, two evaluations a step.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        d = noisier - t
        half = latent + d / 2 * velocity_at(model, latent, img_ids, cond, t)
        latent = latent + d * velocity_at(model, half, img_ids, cond, t + d / 2)
        yield latent


def fireflow(
    model: VelocityModel, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """FireFlow (arXiv 2412.07517, section 4): the midpoint method with a reused velocity.

    The first velocity of a step is that of the previous step's midpoint:

        m_i = v(z_i + d/2 m_(i-1), t_i + d/2), m_(-1) = v(z_0, t_0)
        z_(i+1) = z_i + d m_i

    Second order, one evaluation a step and one more at the start.
    """
    velocity = velocity_at(model, latent, img_ids, cond, timesteps[-1])
    for t, noisier in pairwise(timesteps[::-1]):
        d = noisier - t
        velocity = velocity_at(model, latent + d / 2 * velocity, img_ids, cond, t + d / 2)
        latent = latent + d * velocity
        yield latent


def fixed_point(
    model: VelocityModel, latent: Tensor, img_ids: Tensor, cond: Conditioning, timesteps: Sequence[float]
) -> Iterator[Tensor]:
    """AIDI (arXiv 2309.04907, section 3.2): the latent from which one Euler step down leads back.

    It is found by iteration, starting from equation 4:

        z_(i+1) = z_i + d v(z_(i+1), t_(i+1))

    FIXED_POINT_ROUNDS evaluations a step. Exact for plain sampling if they converge.
    """
    for t, noisier in pairwise(timesteps[::-1]):
        guess = latent
        for _ in range(FIXED_POINT_ROUNDS):
            guess = latent + (noisier - t) * velocity_at(model, guess, img_ids, cond, noisier)
        latent = guess
        yield latent


Inversion = Callable[[VelocityModel, Tensor, Tensor, Conditioning, Sequence[float]], Iterator[Tensor]]
INVERSIONS: dict[str, Inversion] = {
    "euler": euler,
    "midpoint": midpoint,
    "fireflow": fireflow,
    "fixed-point": fixed_point,
    "directedit": euler,  # the steps back are not Euler's, see `flux.editing.source`
}
