"""Conditions of a pass, and interventions beside them, against passes with everything joined by hand."""

from dataclasses import replace

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.conditions import CONTEXT, condition, joined, of_row
from torch.testing import assert_close

from flux.errors import InputError
from flux.inputs import Condition, Inputs
from flux.intervention import FreeTokens, Intervention
from flux.modules.step_cache import StepCache
from flux.runtime.parallel import ProcessGroup, SequenceParallelFlux

EVERY = frozenset(range(tiny_models.NUM_LAYERS))
VITAL = frozenset({0, 2, 3, 6})
TOKENS = 15


@pytest.fixture(scope="module")
def model():
    return conditions.model()


@pytest.fixture(scope="module")
def given():
    return conditions.two_rows()


@pytest.fixture(scope="module")
def whole():
    return condition(2, TOKENS)


KINDS = {"channels": ("channels",), "context": ("context", "context_ids"), "text": ("txt",)}


@pytest.mark.parametrize("kind", ["all", *KINDS])
def test_a_condition_is_more_channels_and_tokens(given, whole, kind):
    """Upstream's call with everything joined, and the velocity of the noise tokens. Bit for bit."""
    only = whole if kind == "all" else Condition(**{name: getattr(whole, name) for name in KINDS[kind]})
    model = conditions.model()
    if only.channels is None:
        model = tiny_models.flux()
        only = only if only.context is None else replace(only, context=only.context[..., :64])
    velocity, _ = model.observe(Inputs(**given, condition=only))
    assert torch.equal(velocity, model(**joined(given, only))[:, :TOKENS])


def test_the_velocity_of_diffusers(model, given, whole):
    """Measured 4e-7."""
    theirs = tiny_models.ask_diffusers(tiny_models.diffusers_transformer(model), joined(given, whole))
    velocity, _ = model.observe(Inputs(**given, condition=whole))
    assert tiny_models.relative_error(velocity, theirs[:, :TOKENS]) < 1e-6


def test_an_empty_condition_changes_nothing(given):
    model = tiny_models.flux()
    velocity, _ = model.observe(Inputs(**given, condition=Condition().expanded(2)))
    assert torch.equal(velocity, model(**given))


def test_keys_and_values_of_noise_tokens_are_kept(model, given, whole):
    inputs = Inputs(**given, condition=whole)
    velocity, found = model.observe(inputs, Intervention(keep=EVERY))
    assert {x.shape[2] for kv in found.kept.values() for x in kv} == {TOKENS}
    again, _ = model.observe(inputs, Intervention(inject=found.kept))
    assert_close(again, velocity, rtol=0, atol=2e-6)


@pytest.mark.parametrize("weight", [1.0, 0.5, torch.linspace(0, 1, TOKENS)[None]], ids=["1", "0.5", "each"])
def test_injected_in_noise_tokens_alone(model, given, whole, weight):
    """By hand, row 0's are written over the edit's; a weight lies between two whole passes in one layer."""
    kept = model.observe(of_row(given, whole, 0), Intervention(keep=EVERY))[1].kept
    edit, wide = of_row(given, whole, 1), joined(given, whole)
    if isinstance(weight, float) and weight == 1:
        inject = {layer: kept[layer] for layer in VITAL}
        by_hand = tiny_models.hand_forward(model, wide, VITAL, num_context=CONTEXT)[1:]
        velocity, _ = model.observe(edit, Intervention(inject=inject))
        assert tiny_models.relative_error(velocity, by_hand) < 2e-6
        plain = tiny_models.hand_forward(model, wide, num_context=CONTEXT)[1:]
        assert tiny_models.relative_error(plain, by_hand) > 1e-3, "injection does nothing"
        return
    own = model.observe(edit, Intervention(keep=EVERY))[1].kept[3]
    each = weight[:, None, :, None] if isinstance(weight, torch.Tensor) else weight
    blend = tuple(mine + each * (theirs - mine) for mine, theirs in zip(own, kept[3]))
    expected, _ = model.observe(edit, Intervention(inject={3: blend}))
    velocity, _ = model.observe(edit, Intervention(inject={3: kept[3]}, inject_weights={3: weight}))
    assert_close(velocity, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("layers", [frozenset(), VITAL], ids=["no layers", "vital layers"])
def test_free_tokens_beside_all_context_tokens(model, given, whole, layers):
    mask = torch.arange(TOKENS) % 5 < 2
    kept = model.observe(of_row(given, whole, 0), Intervention(keep=EVERY))[1].kept
    free = replace(FreeTokens.of(mask), kv=kept)
    intervention = Intervention(inject={layer: kept[layer] for layer in layers}, free=free)
    velocity, _ = model.observe(of_row(given, whole, 1), intervention)
    by_hand = tiny_models.hand_forward(model, joined(given, whole), layers, ~mask, CONTEXT)[1:]
    assert tiny_models.relative_error(velocity[:, mask], by_hand[:, mask]) < 2e-6
    assert not velocity[:, ~mask].any()


def test_all_tokens_free_is_a_whole_pass(model, given, whole):
    everything = torch.ones(TOKENS, dtype=torch.bool)
    kept = model.observe(of_row(given, whole, 0), Intervention(keep=EVERY))[1].kept
    edit, free = of_row(given, whole, 1), replace(FreeTokens.of(everything), kv=kept)
    velocity, _ = model.observe(edit, Intervention(free=free))
    assert_close(velocity, model.observe(edit)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("layers", [{1}, {4}, {0, 2, 5}], ids=str)
def test_all_tokens_skip_a_layer(model, given, whole, layers):
    skipped = model.observe(Inputs(**given, condition=whole), Intervention(skip=frozenset(layers)))[0]
    without = conditions.model()
    for layer in layers:
        for name, x in without.blocks[layer].named_parameters():
            if "mod" in name:
                x.data.zero_()
    by_hand = tiny_models.hand_forward(without, joined(given, whole), num_context=CONTEXT)
    assert tiny_models.relative_error(skipped, by_hand) < 2e-6


def test_streams_to_start_with(model, given, whole):
    inputs = Inputs(**given, condition=whole)
    streams, velocity = model.streams(inputs), model.observe(inputs)[0]
    for start in streams:
        assert torch.equal(model.observe(inputs, start=start)[0], velocity)


def test_watched_tokens(model, given, whole):
    """Queries of prompt and noise; their keys first, then those of the condition. Against a plain pass."""
    watched = model.observe(Inputs(**given, condition=whole), Intervention(watch=EVERY))[1].watched
    plain = model.observe(Inputs(**joined(given, whole)), Intervention(watch=EVERY))[1].watched
    num_txt = given["txt"].shape[1]
    text, image_txt = range(num_txt), range(num_txt, num_txt + 4)
    image, context = range(num_txt + 4, num_txt + 4 + TOKENS), range(num_txt + 4 + TOKENS, num_txt + 28)
    for layer, (q, k) in plain.items():
        assert torch.equal(watched[layer][0], q[:, :, [*text, *image]])
        assert torch.equal(watched[layer][1], k[:, :, [*text, *image, *image_txt, *context]])


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_context_strength(model, given, whole, strength):
    """By hand, with and without injection beside it."""
    scaled = replace(whole, context_strength=strength)
    velocity, _ = model.observe(Inputs(**given, condition=scaled))
    wide = joined(given, whole)
    by_hand = tiny_models.hand_forward(model, wide, num_context=CONTEXT, context_strength=strength)
    assert tiny_models.relative_error(velocity, by_hand) < 2e-6
    plain = tiny_models.hand_forward(model, wide, num_context=CONTEXT)
    assert tiny_models.relative_error(plain, by_hand) > 1e-3, "the strength does nothing"

    kept = model.observe(of_row(given, scaled, 0), Intervention(keep=VITAL))[1].kept
    velocity, _ = model.observe(of_row(given, scaled, 1), Intervention(inject=kept))
    by_hand = tiny_models.hand_forward(model, wide, VITAL, num_context=CONTEXT, context_strength=strength)
    assert tiny_models.relative_error(velocity, by_hand[1:]) < 2e-6


@pytest.mark.parametrize("layers", [frozenset({0}), frozenset({1, 4, 5}), VITAL], ids=sorted)
def test_layers_that_hide_the_context(model, given, whole, layers):
    """By hand, with and without injection and free tokens beside it."""
    wide, hide = joined(given, whole), Intervention(hide_context=layers)
    velocity, _ = model.observe(Inputs(**given, condition=whole), hide)
    by_hand = tiny_models.hand_forward(model, wide, num_context=CONTEXT, hidden=layers)
    assert tiny_models.relative_error(velocity, by_hand) < 2e-6
    seen = tiny_models.hand_forward(model, wide, num_context=CONTEXT)
    assert tiny_models.relative_error(seen, by_hand) > 1e-3, "hiding does nothing"

    kept = model.observe(of_row(given, whole, 0), replace(hide, keep=EVERY))[1].kept
    mask = torch.arange(TOKENS) % 5 < 2
    free = replace(FreeTokens.of(mask), kv=kept)
    both = replace(hide, inject={layer: kept[layer] for layer in VITAL}, free=free)
    velocity, _ = model.observe(of_row(given, whole, 1), both)
    by_hand = tiny_models.hand_forward(model, wide, VITAL, ~mask, CONTEXT, hidden=layers)[1:]
    assert tiny_models.relative_error(velocity[:, mask], by_hand[:, mask]) < 2e-6


def test_hidden_in_all_layers_is_no_context(model, given, whole):
    hidden, _ = model.observe(Inputs(**given, condition=whole), Intervention(hide_context=EVERY))
    without = replace(whole, context=None, context_ids=None)
    assert_close(hidden, model.observe(Inputs(**given, condition=without))[0], rtol=0, atol=2e-6)


def test_the_cache_is_asked_about_noise_tokens(model, given, whole):
    class Seen(StepCache):
        def image_out(self, img, layers):
            shapes.append(img.shape[1])
            return super().image_out(img, layers)

    shapes = []
    inputs = Inputs(**given, condition=whole)
    velocity, _ = model.observe(inputs, cache=Seen(0.0))
    assert shapes == [TOKENS]
    assert torch.equal(velocity, model.observe(inputs)[0])


# ---- rows


def test_rows_are_those_of_separate_passes(model, given, whole):
    together, _ = model.observe(Inputs(**given, condition=whole))
    for row in (0, 1):
        alone, _ = model.observe(of_row(given, whole, row))
        assert_close(together[row : row + 1], alone, rtol=0, atol=5e-6)


def test_a_single_row_serves_a_batch():
    one = condition(1, TOKENS)
    assert torch.equal(one.expanded(3).channels[2], one.channels[0])
    assert torch.equal(one.at_rows([5]).context, one.context)
    stacked = one.stacked(condition(1, TOKENS, seed=1))
    assert torch.equal(stacked.at_rows([0]).txt, one.txt)
    assert len(stacked.txt) == 2


def test_rows_of_another_batch_are_refused():
    with pytest.raises(InputError, match="2 rows for a batch of 3"):
        condition(2, TOKENS).expanded(3)


def test_conditions_of_other_kinds_are_not_one_batch():
    with pytest.raises(ValueError, match="channels differs"):
        condition(1, TOKENS).stacked(condition(1, TOKENS, channels=None))


# ---- what does not fit


def test_a_model_of_another_kind_is_refused(given, whole):
    with pytest.raises(InputError, match="64 channels and 24 of a condition, but the model takes 64"):
        tiny_models.flux().observe(Inputs(**given, condition=whole))


def test_a_condition_is_missing(model, given):
    with pytest.raises(InputError, match="64 channels and 0 of a condition, but the model takes 88"):
        model.observe(Inputs(**given))


def test_a_condition_of_another_size_is_refused(model, given):
    with pytest.raises(InputError, match="12 tokens for an image of 15"):
        model.observe(Inputs(**given, condition=condition(2, 12)))


def test_context_of_other_channels_is_refused(model, given, whole):
    narrow = replace(whole, context=whole.context[..., :64])
    with pytest.raises(InputError, match="context tokens of 64 channels, but the model takes 88"):
        model.observe(Inputs(**given, condition=narrow))


def test_context_without_positions_is_refused(model, given, whole):
    with pytest.raises(InputError, match="without positions"):
        model.observe(Inputs(**given, condition=replace(whole, context_ids=None)))


def test_what_several_gpus_cannot_do(model, given, whole):
    context = model.observe(Inputs(**given, condition=whole), Intervention(keep_context=True))[1].context
    bare = Intervention(hide_context=VITAL, inject_context={n: context[n] for n in EVERY - {2, 3}})
    parallel = SequenceParallelFlux(model, ProcessGroup(0, 2))
    with pytest.raises(InputError, match=r"layers \[2, 3\] that hide a context which is not computed"):
        parallel.observe(Inputs(**given, condition=whole), bare)
    parallel = SequenceParallelFlux(model, ProcessGroup(0, CONTEXT + 1))
    with pytest.raises(InputError, match="strength 2 for 9 context tokens on 10 GPUs"):
        parallel.observe(Inputs(**given, condition=replace(whole, context_strength=2.0)))
