"""Random images and conditions for tiny models, and the same as tokens and channels joined by hand."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux.inputs import Condition, Inputs
from flux.sampling import image_ids
from helpers import tiny_models

CHANNELS = 24  # of a condition, behind the latent's 64
CONTEXT = 9  # tokens: a context image of 3 x 3


def model():
    """A tiny transformer that takes the latent's channels and those of a condition."""
    return tiny_models.flux(in_channels=64 + CHANNELS)


def two_rows() -> dict[str, Tensor]:
    """The inputs of a reference and an edit, 15 noise tokens each, at one noise level."""
    rows = tiny_models.inputs(2, 48, 80)
    return {**rows, "timesteps": rows["timesteps"][:1].expand(2)}


def of_row(given: dict[str, Tensor], condition: Condition, row: int) -> Inputs:
    """One row of these inputs, with its row of a condition."""
    return Inputs(**tiny_models.rows_of(given, [row]), condition=condition.at_rows([row]))


def condition(batch: int, num_img: int, seed: int = 0, **changes) -> Condition:
    """Channels, context tokens and text tokens, all at once."""
    generator = torch.Generator().manual_seed(100 + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    tensors = {
        "channels": draw(num_img, CHANNELS),
        "context": draw(CONTEXT, 64 + CHANNELS),
        "context_ids": image_ids(batch, 48, 48, "cpu", index=1),
        "txt": draw(4, tiny_models.PARAMS.context_in_dim),
    }
    return Condition(**tensors | changes)


def joined(given: dict[str, Tensor], condition: Condition) -> dict[str, Tensor]:
    """Arguments of upstream's `Flux.forward` that have all of the condition in them."""
    img, ids, txt = given["img"], given["img_ids"], given["txt"]
    if condition.channels is not None:
        img = torch.cat((img, condition.channels), 2)
    if condition.context is not None:
        img, ids = torch.cat((img, condition.context), 1), torch.cat((ids, condition.context_ids), 1)
    if condition.txt is not None:
        txt = torch.cat((txt, condition.txt), 1)
    txt_ids = torch.zeros(*txt.shape[:2], 3)
    return {**given, "img": img, "img_ids": ids, "txt": txt, "txt_ids": txt_ids}


def draw(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth image of random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
