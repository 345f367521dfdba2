"""Inversions against the ODE's own solution, the order that each claims, and the way back down."""

import math

import pytest
import torch
from helpers import tiny_models
from test_sampling import NO_TEXT, Field
from torch.testing import assert_close

from flux import sampling
from flux.editing import inversion
from flux.editing.flow_edit import flow_edit
from flux.editing.inversion import INVERSIONS
from flux.sampling import Conditioning

LEVELS = sampling.get_schedule(7, 1024)


@pytest.fixture
def latent():
    return torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ids():
    return sampling.image_ids(1, 32, 48, "cpu")


def climb(method, field, latent, ids, levels=LEVELS) -> list[torch.Tensor]:
    return list(INVERSIONS[method](field, latent, ids, NO_TEXT, levels))


@pytest.mark.parametrize("method", INVERSIONS)
def test_all_are_exact_on_a_constant_field(method, latent, ids):
    """One latent for each level above the clean one: catches a step of a wrong length, sign or place."""
    field = Field(lambda x, t, txt: torch.full_like(x, 0.7))
    up = climb(method, field, latent, ids)
    assert len(up) == 7
    for found, level in zip(up, LEVELS[-2::-1]):
        assert_close(found, latent + 0.7 * level, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "passes"), [("euler", 7), ("midpoint", 14), ("fireflow", 8), ("fixed-point", 28)]
)
def test_evaluations(method, passes, latent, ids):
    field = Field(lambda x, t, txt: x)
    climb(method, field, latent, ids)
    assert len(field.asked) == passes


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("fireflow", 2), ("fixed-point", 1)]
)
def test_order(method, order, latent, ids):
    """dx/dt = x t climbs from x to x e^(1/2); twice the steps divide the error by 2^order."""
    field, errors = Field(lambda x, t, txt: x * t), []
    for steps in (40, 80):
        levels = sampling.get_schedule(steps, 1024, shift=False)
        end = climb(method, field, latent, ids, levels)[-1]
        errors.append(((end - latent * math.exp(0.5)).norm() / latent.norm()).item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_euler_then_sampling_retraces_a_field_that_knows_no_place(latent, ids):
    """Where the velocity depends on the noise level alone, Euler's method finds its own path again."""
    field = Field(lambda x, t, txt: t * torch.ones_like(x))
    up = climb("euler", field, latent, ids)
    assert [asked.t.item() for asked in field.asked] == pytest.approx(LEVELS[-2::-1])
    down = list(sampling.sample(field, up[-1], ids, NO_TEXT, LEVELS))
    assert_close(down[-1].latent, latent, rtol=0, atol=1e-6)
    for step, found in zip(down, up[::-1]):
        assert_close(step.noisy, found, rtol=0, atol=1e-6)


def test_sampling_leads_back_from_a_fixed_point(latent, ids):
    """Four rounds leave little of the error of the first, which is equation 4's."""
    field = Field(lambda x, t, txt: torch.sin(x + t))
    errors = {}
    for method in ("euler", "fixed-point"):
        up = climb(method, field, latent, ids)
        down = list(sampling.sample(field, up[-1], ids, NO_TEXT, LEVELS))
        errors[method] = (down[-1].latent - latent).norm()
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


# ---- FlowEdit


def told(*values: float) -> Conditioning:
    """Texts that the fields below read as numbers."""
    rows = len(values)
    txt = torch.tensor(values)[:, None, None]
    return Conditioning(txt, NO_TEXT.txt_ids.expand(rows, -1, -1), NO_TEXT.vec.expand(rows, -1))


def noises(count: int = 7) -> list[torch.Tensor]:
    return [torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def test_flow_edit_to_the_same_prompt_changes_nothing(latent, ids):
    field = Field(lambda x, t, txt: torch.sin(x) * txt)
    *_, end = flow_edit(field, latent, ids, told(2.0), told(2.0), LEVELS, noises())
    assert torch.equal(end, latent)


def test_flow_edit_walks_along_the_difference(latent, ids):
    """A field of the text alone: each edit moves by its difference, times the noise level where it begins."""
    field = Field(lambda x, t, txt: txt * torch.ones_like(x))
    steps = list(flow_edit(field, latent, ids, told(2.0), told(5.0, 1.0), LEVELS, noises()))
    assert len(steps) == 7
    assert torch.equal(steps[0], latent.expand(2, -1, -1))
    begin = LEVELS[1]
    for row, difference in enumerate((3.0, -1.0)):
        assert_close(steps[-1][row : row + 1], latent - begin * difference, rtol=0, atol=1e-6)


def test_flow_edit_asks_at_noise_of_its_own(latent, ids):
    """The source between latent and that step's noise; the target as far from there as the edit has come."""
    field, drawn = Field(lambda x, t, txt: txt * torch.ones_like(x)), noises()
    steps = list(flow_edit(field, latent, ids, told(2.0), told(5.0), LEVELS, drawn))
    for index, (source, target) in enumerate(zip(field.asked[::2], field.asked[1::2]), start=1):
        noisy = (1 - LEVELS[index]) * latent + LEVELS[index] * drawn[index]
        assert_close(source.img, noisy, rtol=0, atol=1e-6)
        assert_close(target.img, noisy + steps[index - 1] - latent, rtol=0, atol=1e-6)


def test_flow_edit_leaves_what_the_mask_forbids(latent, ids):
    field, mask = Field(lambda x, t, txt: txt * torch.ones_like(x)), torch.zeros(1, 6, 1, dtype=torch.bool)
    mask[:, 2] = True
    *_, end = flow_edit(field, latent, ids, told(2.0), told(5.0), LEVELS, noises(), mask)
    assert torch.equal(end[:, [0, 1, 3, 4, 5]], latent[:, [0, 1, 3, 4, 5]])
    assert (end[:, 2] - latent[:, 2]).abs().min() > 1
