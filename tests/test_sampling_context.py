"""Context tokens that are computed in some steps only, against steps taken one by one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.conditions import CONTEXT, condition
from torch.testing import assert_close

from flux import sampling
from flux.errors import InputError
from flux.inputs import Condition
from flux.intervention import Intervention
from flux.modules.step_cache import StepCache
from flux.sampling import Conditioning, ContextReuse, euler_step, sample

TOKENS = 15
LEVELS = [1.0, 0.8, 0.55, 0.3, 0.0]


@pytest.fixture(scope="module")
def model():
    return conditions.model()


@pytest.fixture(scope="module")
def given():
    return tiny_models.inputs(2, 48, 80)


@pytest.fixture
def computed(model):
    """The number of image tokens that each pass of `model` computes."""
    counts: list[int] = []
    hook = model.img_in.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    yield counts
    hook.remove()


def conditioning(given, every: int = 1, guided: bool = False, **more) -> Conditioning:
    def of(rows) -> Conditioning:
        return Conditioning(rows["txt"], rows["txt_ids"], rows["y"], rows["guidance"])

    cond = replace(of(given), **more)
    if guided:
        cond = replace(cond, true_cfg=3.0, negative=of(tiny_models.inputs(2, 48, 80, seed=5)))
    return cond.with_condition(condition(1, TOKENS), every)


def last(model, given, cond, levels=LEVELS, *more, **named):
    *_, step = sample(model, given["img"], given["img_ids"], cond, levels, *more, **named)
    return step.latent


@pytest.mark.parametrize("guided", [False, True])
def test_computed_in_every_step_changes_nothing(model, given, guided):
    cond = conditioning(given, guided=guided)
    assert torch.equal(last(model, given, cond), last(model, given, cond, context=ContextReuse(1)))
    assert ContextReuse.of(cond) is None
    assert ContextReuse.of(replace(cond, condition=Condition(), context_every=2)) is None


@pytest.mark.parametrize("kind", ["double", "single"])
def test_exact_where_the_context_does_not_see_the_noise(given, kind):
    """A model of one layer that does not know the noise level. In a model of more, it is not exact."""
    layers = {"depth": int(kind == "double"), "depth_single_blocks": int(kind == "single")}
    one = tiny_models.flux(in_channels=64 + conditions.CHANNELS, **layers)
    for parameter in one.time_in.parameters():
        parameter.zero_()
    plain, reused = (last(one, given, conditioning(given, every)) for every in (1, 4))
    assert_close(reused, plain, rtol=0, atol=5e-6)
    without = conditioning(given, 4)
    without = without.with_condition(without.condition.without_context())
    assert (last(one, given, without) - plain).abs().max() > 0.1, "the noise does not see the context"

    more = conditions.model()
    assert (
        last(more, given, conditioning(given, 4)) - last(more, given, conditioning(given))
    ).abs().max() > 0.01


@pytest.mark.parametrize(("every", "whole"), [(1, {0, 1, 2, 3}), (2, {0, 2}), (3, {0, 3}), (9, {0})])
def test_tokens_that_are_computed(model, given, computed, every, whole):
    last(model, given, conditioning(given, every))
    assert computed == [TOKENS + CONTEXT * (step in whole) for step in range(4)]


@pytest.mark.parametrize("guided", [False, True])
def test_steps_taken_one_by_one(model, given, guided):
    """Each pass with what its own pass two steps ago kept, or one step ago."""
    cond, img, kept = conditioning(given, 2, guided), given["img"], {}
    for index, (t, t_next) in enumerate(pairwise(LEVELS)):
        velocities = []
        for number, each in enumerate((cond, cond.negative)[: 1 + guided]):
            inputs = sampling.model_inputs(img, given["img_ids"], each, t)
            change = (
                Intervention(inject_context=kept[number]) if index % 2 else Intervention(keep_context=True)
            )
            velocity, found = model.observe(inputs, change)
            velocities.append(velocity)
            kept[number] = found.context or kept[number]
        velocity = velocities[0]
        if guided:
            velocity = sampling.guided(img, t, *velocities, cond)
        img = img + (t_next - t) * velocity
    assert_close(last(model, given, cond), img, rtol=0, atol=2e-5)


def test_both_passes_as_one_batch(model, given, monkeypatch, computed):
    cond = conditioning(given, 3, guided=True)
    apart = last(model, given, cond)
    assert computed == [TOKENS + CONTEXT * (step in (0, 3)) for step in range(4) for _ in range(2)]
    monkeypatch.setattr("flux.sampling.steps.in_one_batch", lambda img: True)
    computed.clear()
    together = last(model, given, cond)
    assert computed == [TOKENS + CONTEXT * (step in (0, 3)) for step in range(4)]
    assert_close(together, apart, rtol=0, atol=5e-5)


@pytest.mark.parametrize("one_batch", [False, True])
def test_a_negative_pass_that_begins_later(model, given, monkeypatch, computed, one_batch):
    """Its context is computed in its first step, and that of a batch of both passes too."""
    monkeypatch.setattr("flux.sampling.steps.in_one_batch", lambda img: one_batch)
    cond, context, img = conditioning(given, 9, guided=True), ContextReuse(9), given["img"]
    for index, (t, t_next) in enumerate(pairwise(LEVELS)):
        each = cond if index > 1 else replace(cond, negative=None)
        img = euler_step(model, img, given["img_ids"], each, t, t_next, context=context).latent
    wide = TOKENS + CONTEXT
    assert computed == (
        [wide, TOKENS, wide, TOKENS] if one_batch else [wide, TOKENS, TOKENS, wide, TOKENS, TOKENS]
    )


def test_a_cache_beside_it_is_refused(model, given):
    with pytest.raises(InputError, match="Got a cache and a context that is reused"):
        last(model, given, conditioning(given, 2), cache=StepCache(0.1))


def test_rows_are_those_of_separate_samplings(model, given):
    together = last(model, given, conditioning(given, 2))
    for row in (0, 1):
        own = {name: None if x is None else x[[row]] for name, x in given.items()}
        assert_close(last(model, own, conditioning(own, 2)), together[[row]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_context_kept_on_request(model, given, guided):
    """A step hands out what its own intervention keeps, and nothing of what is reused."""
    cond, where = conditioning(given, 2, guided), (given["img"], given["img_ids"])
    keep = Intervention(keep_context=True)
    plain, kept = (
        list(sample(model, *where, cond, LEVELS, each, context=context))
        for each, context in ((Intervention(), None), (keep, ContextReuse(1)))
    )
    assert not any(kv for step in plain for kv in step.context)
    for step in kept:
        again = step.context.map(lambda kv: Intervention(inject_context=kv))
        velocity = euler_step(model, step.noisy, given["img_ids"], cond, step.t, step.t_next, again).velocity
        assert_close(velocity, step.velocity, rtol=0, atol=2e-5)
        assert [len(kv) for kv in step.context] == [tiny_models.NUM_LAYERS] * (1 + guided)


def test_what_a_step_injects_comes_first(model, given):
    """In its layers; in the others, what is known from the step before is used."""
    cond = conditioning(given, 2)
    first, second, *_ = pairwise(LEVELS)
    begin = euler_step(model, given["img"], given["img_ids"], cond, *first, Intervention(keep_context=True))
    own = {3: tuple(x + 1 for x in begin.context.positive[3])}
    mine = Intervention(inject_context=own)
    *_, step = sample(model, given["img"], given["img_ids"], cond, LEVELS[:3], [Intervention(), mine])
    both = Intervention(inject_context={**begin.context.positive, **own})
    expected = euler_step(model, begin.latent, given["img_ids"], cond, *second, both)
    assert_close(step.latent, expected.latent, rtol=0, atol=5e-6)


def test_beside_interventions_of_each_step(model, given, computed):
    """A layer skipped in all steps, and in each row another one; a step's own injection comes first."""
    cond = conditioning(given, 9)
    skips = [Intervention(skip=frozenset({1, 4})), Intervention(skip=(frozenset({1}), frozenset({4})))]
    for skip in skips:
        assert not torch.equal(last(model, given, cond, LEVELS, skip), last(model, given, cond))
    assert set(computed[1:4]) == set(computed[5:8]) == {TOKENS}
    kept = model.observe(
        sampling.model_inputs(given["img"], given["img_ids"], cond, 0.5), Intervention(keep_context=True)
    )
    own = Intervention(inject_context=kept[1].context)
    computed.clear()
    mine = last(model, given, cond, LEVELS, [own] * 4)
    assert computed == [TOKENS] * 4
    assert_close(mine, last(model, given, conditioning(given), LEVELS, [own] * 4), rtol=0, atol=0)
