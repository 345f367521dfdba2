"""Conditions on their way through the steps, to each row and each pass of true guidance."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.conditions import condition, joined
from torch.testing import assert_close

from flux.errors import InputError
from flux.inputs import Condition
from flux.intervention import Intervention
from flux.sampling import Conditioning, denoise, euler_step, sample, steps, streams

TOKENS = 15
LEVELS = [1.0, 0.8, 0.5, 0.0]


@pytest.fixture(scope="module")
def model():
    return conditions.model()


@pytest.fixture(scope="module")
def given():
    """Two rows; the latent has the 64 channels of noise alone."""
    rows = tiny_models.inputs(2, 48, 80)
    return rows | {"guidance": torch.tensor([3.5, 3.5])}


def conditioning(given, seed: int | None = None, **more) -> Conditioning:
    rows = given if seed is None else tiny_models.inputs(2, 48, 80, seed=seed)
    return Conditioning(rows["txt"], rows["txt_ids"], rows["y"], given["guidance"], **more)


def by_hand(model, given, whole: Condition) -> torch.Tensor:
    """Euler's steps as upstream takes them: all in one tensor, of which the noise tokens move."""
    img = given["img"]
    for t, t_next in pairwise(LEVELS):
        level = torch.full((2,), t)
        velocity = model(**joined({**given, "img": img, "timesteps": level}, whole))[:, :TOKENS]
        img = img + (t_next - t) * velocity
    return img


def test_steps_move_noise_tokens_alone(model, given):
    whole = condition(2, TOKENS)
    cond = conditioning(given).with_condition(whole)
    *_, last = sample(model, given["img"], given["img_ids"], cond, LEVELS)
    assert_close(last.latent, by_hand(model, given, whole), rtol=0, atol=5e-6)
    assert last.noisy.shape == given["img"].shape


def test_upstreams_call(model, given):
    """The places after guidance are upstream's."""
    whole = replace(condition(2, TOKENS), txt=None)
    places = given["img"], given["img_ids"], given["txt"], given["txt_ids"], given["y"], LEVELS, 3.5
    latent = denoise(model, *places, whole.channels, whole.context, whole.context_ids)
    assert_close(latent, by_hand(model, given, whole), rtol=0, atol=5e-6)


def test_one_row_of_a_condition_serves_a_batch(model, given):
    one = condition(1, TOKENS)
    alone, repeated = (
        euler_step(model, given["img"], given["img_ids"], conditioning(given).with_condition(each), 0.8, 0.6)
        for each in (one, one.expanded(2))
    )
    assert torch.equal(alone.velocity, repeated.velocity)


def test_no_condition_changes_nothing(given):
    plain, model = conditioning(given), tiny_models.flux()
    first, second = (
        euler_step(model, given["img"], given["img_ids"], cond, 0.8, 0.6).velocity
        for cond in (plain, plain.with_condition(Condition()))
    )
    assert torch.equal(first, second)


def test_rows_have_their_own_conditions(model, given):
    cond = conditioning(given, negative=conditioning(given, seed=5), true_cfg=2.0)
    cond = cond.with_condition(condition(2, TOKENS)).scheduled(model, LEVELS)
    together = euler_step(model, given["img"], given["img_ids"], cond, 0.8, 0.6).velocity
    for row in (0, 1):
        img = given["img"][row : row + 1]
        alone = euler_step(model, img, given["img_ids"], cond.at_rows([row]), 0.8, 0.6).velocity
        assert_close(alone, together[row : row + 1], rtol=0, atol=5e-6)
    first = cond.at_rows([0])
    assert torch.equal(first.expanded(3).condition.channels[2], first.condition.channels[0])


@pytest.mark.parametrize("one_batch", [False, True])
def test_both_passes_of_true_guidance_are_steered(model, given, monkeypatch, one_batch):
    """As two passes by hand; with streams to start with, and with keys and values kept and injected."""
    monkeypatch.setattr(steps, "in_one_batch", lambda img: one_batch)
    cond = conditioning(given, negative=conditioning(given, seed=5), true_cfg=3.0)
    cond = cond.with_condition(condition(2, TOKENS))
    where = model, given["img"], given["img_ids"]
    step = euler_step(*where, cond, 0.8, 0.6, Intervention(keep=frozenset({1, 4})))
    velocity, away = (
        euler_step(*where, each, 0.8, 0.6).velocity for each in (replace(cond, negative=None), cond.negative)
    )
    expected = away + 3 * (velocity - away)
    assert_close(step.velocity, expected, rtol=0, atol=2e-5)
    start = streams(*where, cond, 0.8)[3]
    assert_close(euler_step(*where, cond, 0.8, 0.6, start=start).velocity, expected, rtol=0, atol=2e-5)
    inject = step.kept.map(lambda kv: Intervention(inject=kv))
    assert_close(euler_step(*where, cond, 0.8, 0.6, inject).velocity, expected, rtol=0, atol=2e-5)


def test_as_many_rows_as_prompts(given):
    with pytest.raises(InputError, match="a condition of 3 rows for a batch of 2"):
        conditioning(given).with_condition(condition(3, TOKENS))
