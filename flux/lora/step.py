"""One training step: noise on latents, the model's velocity, its distance to the true one."""

import torch
from torch import Tensor

from flux.conditions.kontext import context_ids
from flux.inputs import Condition
from flux.model import Flux, Inputs
from flux.sampling import get_lin_function, time_shift
from flux.specs import ModelSpec


def noise_levels(draws: Tensor, tokens: int, spec: ModelSpec, dtype: torch.dtype) -> Tensor:
    """The noise levels of training: shift(sigmoid(n)) (arXiv 2403.03206, sections 3.1 and 5.3.2).

    The shift is that of the sampler for images of as many tokens.

    Args:
        draws: Normal random numbers n, "B".
        tokens: Image tokens of each row.
        spec: The model, which has the shift.
        dtype: The dtype that the model computes in. Levels are rounded to it, since the model sees them so.

    Returns:
        float32, "B".
    """
    shift = get_lin_function(y1=spec.base_shift, y2=spec.max_shift)(tokens)
    return time_shift(shift, 1.0, draws.sigmoid()).to(dtype).float()


def noisy(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mix latents and noise, "B I 64": (1 - t) x0 + t noise. t is "B"."""
    level = t[:, None, None].to(latents.device)
    return (1 - level) * latents.float() + level * noise


def velocity_loss(model: Flux, inputs: Inputs, velocity: Tensor) -> Tensor:
    """The mean square of model(inputs) - velocity, of each row: "B".

    Args:
        model: The transformer with its factors.
        inputs: Noisy latents and their texts.
        velocity: The true velocity, noise - x0, "B I 64" in float32.
    """
    return (model.observe(inputs)[0].float() - velocity).square().mean(dim=(1, 2))


def context_condition(context: Tensor, width: int, height: int, device: torch.device | str) -> Condition:
    """Make the condition of a batch of pairs, as `flux.conditions.kontext` does of one context image.

    Args:
        context: Packed latents of the context images, "B I 64".
        width: Width of all these images in pixels.
        height: Their height.
        device: Where it is put.
    """
    ids = context_ids([(width, height)]).to(device)
    return Condition(context=context.to(device), context_ids=ids).expanded(len(context))
