"""Images, texts and autoencoder that the tests of conditions share."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.conditions import draw
from PIL import Image

from flux.conditions.base import encoding


@pytest.fixture(scope="session")
def ae(nano):
    return nano.ae


@pytest.fixture(scope="session")
def encode(ae):
    return encoding(ae)


@pytest.fixture(scope="session")
def texts():
    """Encoders that give one text's features to any prompt."""
    generator, sizes = torch.Generator().manual_seed(7), tiny_models.PARAMS
    txt = torch.randn(1, 5, sizes.context_in_dim, generator=generator)
    vec = torch.randn(1, sizes.vec_in_dim, generator=generator)
    encoders = {
        name: lambda prompts, x=x: x.expand(len(prompts), *x.shape[1:])
        for name, x in (("t5", txt), ("clip", vec))
    }
    return SimpleNamespace(txt=txt, vec=vec, **encoders)


@pytest.fixture
def image():
    return draw(96, 64)


@pytest.fixture
def mask():
    """White on an ellipse's place, with edges within tokens."""
    rows, columns = np.ogrid[:64, :96]
    inside = ((rows - 30) / 21) ** 2 + ((columns - 45) / 37) ** 2 < 1
    return Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
