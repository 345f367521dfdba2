"""Which steps reuse the later layers, by the rule written out here; interventions and full steps do not."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from flux import sampling
from flux.intervention import Intervention
from flux.model import Inputs
from flux.modules.step_cache import StepCache
from flux.sampling import Conditioning

LEVELS = sampling.get_schedule(12, 16)


@pytest.fixture
def given():
    return tiny_models.inputs(2, 48, 48)


def steered(given, **more) -> Conditioning:
    guidance = torch.full((2,), 3.0)
    return Conditioning(given["txt"], given["txt_ids"], given["y"], guidance, **more)


def path(model, given, cache=None, interventions=None, **more) -> list[torch.Tensor]:
    arguments = (model, given["img"], given["img_ids"], steered(given, **more), LEVELS)
    interventions = interventions or Intervention()
    return [step.latent for step in sampling.sample(*arguments, interventions, cache=cache)]


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_the_rule_by_hand(given, threshold):
    """From `streams`, which knows nothing of it: the first layer's addition, and that of all others."""
    model, cache = tiny_models.flux(), StepCache(threshold)
    got = path(model, given, cache)
    x, known, full = given["img"], None, 0
    for (t, t_next), latent in zip(pairwise(LEVELS), got):
        rows = {**given, "img": x, "timesteps": torch.full((2,), t), "guidance": torch.full((2,), 3.0)}
        before, after = (streams.img for streams in model.streams(Inputs(**rows))[:2])
        first = after - before
        change = 1.0
        if known:
            change = max(
                float((a - b).abs().sum() / b.abs().sum()) for a, b in zip(first, known[0], strict=True)
            )
        if change >= threshold:
            full += 1
            seen = []
            hook = model.final_layer.register_forward_hook(
                lambda net, args, _, seen=seen: seen.append(args[0])
            )
            model(**rows)
            hook.remove()
            known = (first, seen[0] - after)
        mod = model.modulations(rows["timesteps"], rows["y"], rows["guidance"])[-1]
        x = x + (t_next - t) * model.final_layer(after + known[1], mod=mod)
        assert_close(latent, x, rtol=0, atol=1e-4)
    assert (cache.full, cache.reused) == (full, len(LEVELS) - 1 - full)


def test_a_threshold_that_nothing_meets_changes_nothing(given):
    model, cache = tiny_models.flux(), StepCache(1e-9)
    assert torch.equal(path(model, given, cache)[-1], path(model, given)[-1])
    assert cache.reused == 0


@pytest.mark.parametrize(
    "intervention",
    [
        Intervention(keep=frozenset({1})),
        Intervention(watch=frozenset({1})),
        Intervention(skip=frozenset({0})),
        Intervention(skip=(frozenset(), frozenset({4}))),
    ],
    ids=["keep", "watch", "skip", "skip in a row"],
)
def test_steps_with_an_intervention_are_computed_whole(given, intervention):
    model, cache = tiny_models.flux(), StepCache(1e9)
    assert torch.equal(
        path(model, given, cache, intervention)[-1], path(model, given, None, intervention)[-1]
    )
    assert (cache.full, cache.reused) == (0, 0)


def test_injecting_steps_are_computed_whole(given):
    model, cache = tiny_models.flux(), StepCache(1e9)
    kept = model.observe(
        Inputs(**tiny_models.inputs(1, 48, 48, seed=3)), intervention=Intervention(keep=frozenset({1}))
    )[1]
    inject = Intervention(inject=kept.kept)
    assert torch.equal(path(model, given, cache, inject)[-1], path(model, given, None, inject)[-1])


def test_plain_steps_among_others_are_reused(given):
    model, cache = tiny_models.flux(), StepCache(1e9)
    keeping = Intervention(keep=frozenset({1}))
    path(model, given, cache, [keeping if index % 3 == 0 else Intervention() for index in range(12)])
    assert (cache.full, cache.reused) == (1, 7)


def test_true_guidance_reuses_nothing(given):
    model, cache, negative = (
        tiny_models.flux(),
        StepCache(1e9),
        steered(tiny_models.inputs(2, 48, 48, seed=5)),
    )
    guided = {"negative": negative, "true_cfg": 2.0}
    assert torch.equal(path(model, given, cache, **guided)[-1], path(model, given, **guided)[-1])
    assert (cache.full, cache.reused) == (0, 0)


def test_the_cache_alone():
    """Layers that are not needed are not even computed."""
    cache, img = StepCache(0.1), torch.zeros(1, 2, 3)

    def layers(*added: float):
        out = img
        for value in added:
            assert value == value, "this layer is not to be computed"
            out = out + value
            yield out

    assert torch.equal(cache.image_out(img, layers(1.0, 2.0, 3.0)), torch.full_like(img, 6.0))
    assert torch.equal(cache.image_out(img, layers(1.05, math.nan)), torch.full_like(img, 1.05) + 5.0)
    assert torch.equal(cache.image_out(img, layers(1.2, 0.0)), torch.full_like(img, 1.2))
    assert (cache.full, cache.reused) == (2, 1)
