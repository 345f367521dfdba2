"""True classifier-free guidance: two passes, what they inject, and the range of their result."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from helpers import tiny_models
from helpers.fields import IDS, LATENT, NO_TEXT, Field, conditioning
from torch.testing import assert_close

from flux import sampling
from flux.intervention import Intervention
from flux.model import Inputs
from flux.sampling import Conditioning, Passes, steps

VITAL = frozenset({1, 4})


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def row():
    return tiny_models.inputs(1, 32, 48)


def test_passes_map_over_those_that_there_are():
    assert list(Passes(1).map(str)) == ["1"]
    both = Passes(1, 2).map(str)
    assert (both.positive, both.negative) == ("1", "2")


def test_true_guidance_leads_away_from_the_negative():
    """velocity = negative + scale * (positive - negative)."""
    field = Field(lambda x, t, txt: txt.mean() * torch.ones_like(x))

    def cond(value, **more):
        return Conditioning(torch.full((1, 1, 1), value), NO_TEXT.txt_ids, NO_TEXT.vec, **more)

    steering = cond(2.0, negative=cond(0.5), true_cfg=3.0)
    step = sampling.euler_step(field, LATENT, IDS, steering, 1.0, 0.5)
    assert_close(step.velocity, torch.full_like(LATENT, 0.5 + 3 * 1.5), rtol=0, atol=1e-6)
    assert step.kept.negative == {}
    assert sampling.euler_step(field, LATENT, IDS, cond(2.0), 1.0, 0.5).kept.negative is None


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_both_passes_as_one_batch_are_two_passes(model, row, monkeypatch, rows, weight):
    """With every field of an intervention, and streams to start with."""
    cond = conditioning(row, negative=conditioning(row, seed=2), true_cfg=3.5).expanded(rows)
    img = tiny_models.inputs(rows, 32, 48, seed=5)["img"]
    sources = [tiny_models.inputs(1, 32, 48, seed=seed) for seed in (7, 8)]
    kept = [model.observe(Inputs(**x), intervention=Intervention(keep=VITAL))[1].kept for x in sources]
    weights = {} if weight is None else {1: weight, 4: torch.rand(1, 6)}
    skip = tuple(frozenset({2, row}) for row in range(rows))
    common = {"skip": skip, "keep": frozenset({3, 4}), "inject_weights": weights}
    inject = Passes(*(Intervention(inject=kv, **common) for kv in kept))
    inject = Passes(replace(inject.positive, watch=frozenset({5})), inject.negative)
    start = sampling.streams(model, img, row["img_ids"].expand(rows, -1, -1), cond, 0.8)[1]
    given = (model, img, row["img_ids"], cond, 0.8, 0.6, inject, start)
    apart = sampling.euler_step(*given)
    monkeypatch.setattr(steps, "in_one_batch", lambda img: True)
    together = sampling.euler_step(*given)
    assert_close(together.velocity, apart.velocity, rtol=0, atol=2e-5)
    for found, expected in (
        (together.kept.positive, apart.kept.positive),
        (together.kept.negative, apart.kept.negative),
        (together.watched, apart.watched),
    ):
        assert found.keys() == expected.keys()
        assert found
        for layer, pair in expected.items():
            assert_close(found[layer], pair, rtol=0, atol=1e-5)


def test_both_passes_are_one_batch_on_a_gpu_only():
    """Up to a fixed size, so that a run repeats. A CPU needs longer for one batch than for two."""
    assert not sampling.in_one_batch(torch.empty(1, 4096, 64))
    assert sampling.in_one_batch(torch.empty(2, 4096, 64, device="meta"))
    assert not sampling.in_one_batch(torch.empty(3, 4096, 64, device="meta"))


ROWS = torch.cat((LATENT, 2 * LATENT))


def thresholded(scale, mimic, percentile=0.9):
    away, velocity = torch.zeros_like(ROWS), torch.randn(ROWS.shape, generator=torch.manual_seed(3))
    cond = Conditioning(None, None, None, None, NO_TEXT, scale, mimic, percentile)
    return velocity, sampling.guided(ROWS, 0.5, velocity, away, cond)


def test_thresholding_to_the_same_scale_changes_nothing():
    velocity, got = thresholded(3.0, 3.0)
    assert_close(got, 3 * velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("percentile", [0.5, 0.9, 1.0])
def test_thresholding_brings_the_clean_latent_into_the_range_of_the_smaller_scale(percentile):
    """Each row's channel keeps its mean and gets the largest deviation that the smaller scale gives it."""
    velocity, got = thresholded(8.0, 2.0, percentile)
    clean, full, mimic = (ROWS - 0.5 * v for v in (got, 8 * velocity, 2 * velocity))
    for row, channel in product((0, 1), (0, 17, 63)):
        x, y = full[row, :, channel], mimic[row, :, channel]
        largest = (y - y.mean()).abs().max()
        bound = max(largest, torch.quantile((x - x.mean()).abs(), percentile))
        expected = x.mean() + largest / bound * (x - x.mean()).clamp(-bound, bound)
        assert_close(clean[row, :, channel], expected, rtol=0, atol=1e-5)
        assert (clean[row, :, channel] - x.mean()).abs().max() <= largest + 1e-5


def test_the_negative_pass_injects_from_the_references_negative_pass(model, row):
    """Each pass of the edit injects from the reference's pass of the same kind."""
    nothing = conditioning(row, seed=2)
    reference = conditioning(row, negative=nothing, true_cfg=3.5)
    edit = conditioning(row, seed=1, negative=conditioning(row, seed=3), true_cfg=3.5)
    at = (row["img"], row["img_ids"])
    source = sampling.euler_step(model, *at, reference, 0.8, 0.6, Intervention(keep=VITAL))
    inject = source.kept.map(lambda kept: Intervention(inject=kept))
    step = sampling.euler_step(model, *at, edit, 0.8, 0.6, inject)

    def by_rows(cond: Conditioning, of: Conditioning) -> torch.Tensor:
        both = {name: torch.cat((x, x)) for name, x in row.items()} | {"txt": torch.cat((of.txt, cond.txt))}
        both["timesteps"] = torch.full((2,), 0.8)
        return tiny_models.hand_forward(model, both, inject=VITAL)[1:]

    away = by_rows(edit.negative, nothing)
    expected = away + 3.5 * (by_rows(edit, reference) - away)
    assert_close(step.velocity, expected, rtol=0, atol=5e-5)

    alike = sampling.euler_step(model, *at, edit, 0.8, 0.6, inject.positive)
    away = by_rows(edit.negative, reference)
    assert_close(alike.velocity, away + 3.5 * (by_rows(edit, reference) - away), rtol=0, atol=5e-5)
