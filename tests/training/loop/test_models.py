"""Untrained models."""

import torch
from helpers.training import inputs

from training.loop.models import TOY, build_flux


def test_a_new_transformer_is_the_zero_function():
    with torch.no_grad():
        assert build_flux(TOY.flux)(**inputs()).abs().max() == 0
