"""Rectified flow and folded guidance."""

from dataclasses import replace

import pytest
import torch
from helpers.training import inputs, randomized

from flux.model import Flux
from flux.sampling import get_schedule
from training.loop.models import TOY
from training.stages.flow import add_noise, noise_levels, shift_for, without_guidance


def test_guidance_folds_into_a_bias():
    guided = randomized(Flux(replace(TOY.flux, guidance_embed=True)))
    plain = Flux(TOY.flux)
    plain.load_state_dict(without_guidance(guided.state_dict(), scale=3.5))
    given = inputs()
    torch.testing.assert_close(
        plain(**given), guided(**given, guidance=torch.full((2,), 3.5)), atol=1e-5, rtol=1e-5
    )


def test_noise_levels_follow_the_samplers_shift():
    t = noise_levels(20_000, shift_for(256), torch.device("cpu"))
    assert t.min() > 0
    assert t.max() < 1
    middle = get_schedule(2, 256)[1]
    assert t.median().item() == pytest.approx(middle, abs=0.01)
    assert shift_for(128) == 1


def test_noised_is_a_straight_line():
    latents, t = torch.randn(3, 4, 64), torch.tensor([0.0, 0.5, 1.0])
    x, velocity = add_noise(latents, t)
    torch.testing.assert_close(x - t[:, None, None] * velocity, latents)
