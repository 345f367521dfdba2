"""Toy models and faultless vision for the tests of training."""

from dataclasses import replace

import torch

from flux.model import Flux
from flux.sampling import image_ids
from training.loop.models import TOY
from training.loop.plan import TOY_PLAN
from training.scenes.labels import labels_of
from training.stages.vision import Recognition

MOMENT = {name: replace(stage, seconds=0.01) for name, stage in TOY_PLAN.items()}


def randomized(flux: Flux) -> Flux:
    """The model with every parameter drawn anew, so that no part of it is idle."""
    for parameter in flux.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flux.requires_grad_(False)


def inputs(batch: int = 2) -> dict[str, torch.Tensor]:
    """Random arguments of the toy model's pass, for images of 32x32."""
    return {
        "img": torch.randn(batch, 4, 64),
        "img_ids": image_ids(batch, 32, 32, "cpu"),
        "txt": torch.randn(batch, 5, TOY.flux.context_in_dim),
        "txt_ids": torch.zeros(batch, 5, 3),
        "timesteps": torch.rand(batch),
        "y": torch.randn(batch, TOY.flux.vec_in_dim),
    }


def perfect(scenes) -> Recognition:
    """Recognizes everything in the scenes, without a mistake."""
    labels = labels_of(torch.tensor([scene.row() for scene in scenes]))
    one_hot = torch.nn.functional.one_hot
    return Recognition(
        20 * labels.objects - 10, 20 * labels.worn - 10, 20 * labels.colours - 10,
        one_hot(labels.place, 16).float(), one_hot(labels.time, 3).float(), one_hot(labels.count, 4).float(),
        labels.x,
    )  # fmt: skip
