"""Inversions against the ODE's own solution, the order that each claims, and the way back down."""

import math

import pytest
import torch
from helpers import tiny_models
from helpers.fields import IDS, LATENT, NO_TEXT, Field
from torch.testing import assert_close

from flux import sampling
from flux.editing import inversion
from flux.editing.inversion import INVERSIONS
from flux.sampling import Conditioning

LEVELS = sampling.get_schedule(7, 1024)


def climb(method, field, levels=LEVELS) -> list[torch.Tensor]:
    return list(INVERSIONS[method](field, LATENT, IDS, NO_TEXT, levels))


@pytest.mark.parametrize("method", INVERSIONS)
def test_all_are_exact_on_a_constant_field(method):
    """One latent for each level above the clean one: catches a step of a wrong length, sign or place."""
    field = Field(lambda x, t, txt: torch.full_like(x, 0.7))
    up = climb(method, field)
    assert len(up) == 7
    for found, level in zip(up, LEVELS[-2::-1]):
        assert_close(found, LATENT + 0.7 * level, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "passes"), [("euler", 7), ("midpoint", 14), ("fireflow", 8), ("fixed-point", 28)]
)
def test_each_method_takes_so_many_passes(method, passes):
    field = Field(lambda x, t, txt: x)
    climb(method, field)
    assert len(field.asked) == passes


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("fireflow", 2), ("fixed-point", 1)]
)
def test_errors_fall_by_the_order_of_the_method(method, order):
    """dx/dt = x t climbs from x to x e^(1/2); twice the steps divide the error by 2^order."""
    field, errors = Field(lambda x, t, txt: x * t), []
    for steps in (40, 80):
        levels = sampling.get_schedule(steps, 1024, shift=False)
        end = climb(method, field, levels)[-1]
        errors.append(((end - LATENT * math.exp(0.5)).norm() / LATENT.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_euler_then_sampling_retraces_a_field_that_knows_no_place():
    """Where the velocity depends on the noise level alone, Euler's method finds its own path again."""
    field = Field(lambda x, t, txt: t * torch.ones_like(x))
    up = climb("euler", field)
    assert [asked.t.item() for asked in field.asked] == pytest.approx(LEVELS[-2::-1])
    down = list(sampling.sample(field, up[-1], IDS, NO_TEXT, LEVELS))
    assert_close(down[-1].latent, LATENT, rtol=0, atol=1e-6)
    for step, found in zip(down, up[::-1]):
        assert_close(step.noisy, found, rtol=0, atol=1e-6)


def test_sampling_leads_back_from_a_fixed_point():
    """Four rounds leave little of the error of the first, which is equation 4's."""
    field = Field(lambda x, t, txt: torch.sin(x + t))
    errors = {}
    for method in ("euler", "fixed-point"):
        up = climb(method, field)
        down = list(sampling.sample(field, up[-1], IDS, NO_TEXT, LEVELS))
        errors[method] = (down[-1].latent - LATENT).norm()
    assert errors["fixed-point"] < 0.02 * errors["euler"]


def test_euler_follows_equation_4():
    """z at the noisier level = z + (difference of levels) * velocity(z, noisier level)."""
    model, row = tiny_models.flux(), tiny_models.inputs(1, 32, 48)
    cond = Conditioning(row["txt"], row["txt_ids"], row["y"], row["guidance"])
    levels, x = sampling.get_schedule(3, 6, shift=False), row["img"]
    latents = list(inversion.euler(model, x, row["img_ids"], cond, levels))
    for got, t, noisier in zip(latents, levels[::-1], levels[-2::-1]):
        x = x + (noisier - t) * model(**{**row, "img": x, "timesteps": torch.tensor([noisier])})
        assert_close(got, x, rtol=0, atol=1e-6)
