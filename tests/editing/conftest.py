"""A model for small edits, and what it is asked."""

from dataclasses import replace

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.editing import DOG, TOKENS, make

from flux.conditions.images import Steering


@pytest.fixture(scope="module")
def small(nano):
    """flux-nano's texts and autoencoder around a transformer that takes no time: the pictures mean nothing,
    but nothing here asks for more.
    """
    net = tiny_models.flux(context_in_dim=256, vec_in_dim=128)
    return replace(nano, model=net, spec=replace(nano.spec, params=net.params))


@pytest.fixture(scope="module")
def steered(nano):
    """`small`, with further channels, and a condition of all kinds that steers each pass."""
    net = tiny_models.flux(context_in_dim=256, vec_in_dim=128, in_channels=64 + conditions.CHANNELS)
    whole = conditions.condition(1, TOKENS)
    whole = replace(whole, txt=whole.txt.repeat(1, 1, 13)[..., :256])
    spec = replace(nano.spec, params=net.params)
    return replace(nano, model=net, spec=spec, steering=Steering(whole))


@pytest.fixture
def passes(small, monkeypatch):
    """The interventions of the transformer's passes, as they are made."""
    found, observe = [], small.model.observe

    def observing(inputs, intervention, **more):
        found.append(intervention)
        return observe(inputs, intervention, **more)

    monkeypatch.setattr(small.model, "observe", observing)
    return found


@pytest.fixture(scope="module")
def edited(small):
    with torch.inference_mode():
        return make(small)


@pytest.fixture(scope="module")
def photo(small):
    """An image of another size and shape than the edits'."""
    size = {"width": 128, "height": 64, "num_steps": 6, "guidance": 3.5}
    with torch.inference_mode():
        [picture] = small.generate([DOG], [11], **size, progress=False)
    return picture.resize((400, 200))
