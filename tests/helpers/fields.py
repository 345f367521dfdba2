"""Stands for the model where a velocity by formula is enough, and what it is given."""

from types import SimpleNamespace

import torch
from torch import Tensor

from flux.intervention import NOTHING, Recorded
from flux.sampling import Conditioning, image_ids
from helpers import tiny_models

NO_TEXT = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1, 3), torch.zeros(1, 1))
# A latent of 2 x 3 tokens, and their positions.
LATENT, IDS = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)), image_ids(1, 32, 48, "cpu")


class Field:
    """A velocity by a formula of latent, noise level and text, and a list of what it was asked."""

    def __init__(self, velocity):
        self.velocity, self.asked = velocity, []

    def modulations(self, timesteps, y, guidance=None):
        return []

    def observe(self, inputs, intervention=NOTHING, **_):
        self.asked.append(SimpleNamespace(t=inputs.timesteps, img=inputs.img, intervention=intervention))
        return self.velocity(inputs.img, inputs.timesteps[:, None, None], inputs.txt), Recorded()


def conditioning(row: dict[str, Tensor], seed: int | None = None, **more) -> Conditioning:
    """The condition of a row of inputs, or one with the text of another seed."""
    txt = row["txt"] if seed is None else tiny_models.inputs(1, 32, 48, seed=seed)["txt"]
    return Conditioning(txt, row["txt_ids"], row["y"], row["guidance"], **more)
