"""The path of a photograph that noise is added to, in place of an inversion.

FlowEdit (arXiv 2412.08629, algorithm 1) walks from a photograph's latent x to its edit z along the difference
of two velocities, with new noise e_i in each step:

    s_i = (1 - t_i) x + t_i e_i
    z_(i+1) = z_i + (t_(i+1) - t_i) (v(z_i + s_i - x, t_i, target) - v(s_i, t_i, source))

Here s_i is the path of a reference, as an inversion's is, and y_i = z_i + s_i - x is the edit beside it. Put
in, with r_i = s_i + (t_(i+1) - t_i) v(s_i, t_i, source), the end of the reference's own step:

    y_(i+1) = y_i + (t_(i+1) - t_i) v(y_i, t_i, target) + s_(i+1) - r_i

So an edit takes the Euler step of its own prompt, and what the reference's own step misses of its path is
added: the correction of drift that edits of inverted photographs have too. Each step has a pass of the
reference anyway. Its keys and values are there to inject, and what the mask does not let change is the path.
"""

from collections.abc import Sequence

from torch import Tensor

from flux.loaded_model import LoadedModel


def noised_path(
    pipe: LoadedModel, clean: Tensor, levels: Sequence[float], width: int, height: int, seed: int
) -> list[Tensor]:
    """Add noise to photographs at each level, new noise each time: s_i of the formula above.

    Args:
        pipe: The models.
        clean: The photographs' latents, "R I 64".
        levels: Descending noise levels; the last is 0.
        width: Width of the photographs in pixels.
        height: Height of the photographs in pixels.
        seed: Seed of the first noise. Each following level's is one more.

    Returns:
        The latents at each level, "R I 64". The last is `clean`.
    """
    noises = (pipe.noise([seed + index], width, height) for index in range(len(levels) - 1))
    return [*((1 - t) * clean + t * noise for t, noise in zip(levels, noises)), clean]
