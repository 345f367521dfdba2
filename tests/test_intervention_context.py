"""Keys and values of context tokens kept and injected, against passes with everything joined by hand."""

from dataclasses import replace

import pytest
import torch
from helpers import conditions, tiny_models
from helpers.conditions import CONTEXT, condition, joined, of_row
from torch.testing import assert_close

from flux.errors import InputError
from flux.inputs import Inputs
from flux.intervention import FreeTokens, Intervention

EVERY = frozenset(range(tiny_models.NUM_LAYERS))
VITAL = frozenset({0, 2, 3, 6})
TOKENS = 15
IMAGE = torch.arange(TOKENS + CONTEXT) < TOKENS
KEEP = Intervention(keep=EVERY, keep_context=True)


@pytest.fixture(scope="module")
def model():
    return conditions.model()


@pytest.fixture(scope="module")
def given():
    return conditions.two_rows()


@pytest.fixture(scope="module")
def whole():
    return condition(2, TOKENS)


@pytest.fixture(scope="module")
def found(model, given, whole):
    """The keys and values that the reference's pass hands out."""
    return model.observe(of_row(given, whole, 0), KEEP)[1]


def by_hand(model, given, whole, inject=frozenset(), held=~IMAGE, **more):
    """The edit's velocity, with the reference's context tokens, or with those of `held`."""
    return tiny_models.hand_forward(model, joined(given, whole), inject, held, CONTEXT, **more)[1:]


def test_keeping_changes_nothing(model, given, whole, found):
    inputs = Inputs(**given, condition=whole)
    velocity, both = model.observe(inputs, Intervention(keep_context=True))
    assert torch.equal(velocity, model.observe(inputs)[0])
    assert found.context.keys() == EVERY
    for layer, pair in found.context.items():
        for x, of_both in zip(pair, both.context[layer]):
            assert x.shape == (1, 2, CONTEXT, 16)
            assert_close(x, of_both[:1], rtol=0, atol=5e-6)


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_another_rows_context(model, given, whole, strength):
    """None of the edit's context tokens is computed, and what is kept is already scaled."""
    whole = replace(whole, context_strength=strength)
    kept = model.observe(of_row(given, whole, 0), KEEP)[1].context
    velocity, after = model.observe(
        of_row(given, whole, 1), Intervention(inject_context=kept, keep_context=True)
    )
    expected = by_hand(model, given, whole, context_strength=strength)
    assert tiny_models.relative_error(velocity, expected) < 2e-6
    own = by_hand(model, given, whole, held=None, context_strength=strength)
    assert tiny_models.relative_error(own, expected) > 1e-3, "the context does nothing"
    assert not after.context


def test_no_context_token_is_computed(model, given, whole, found):
    """Not even its values matter, unless a layer needs them."""
    other = replace(whole, context=torch.full_like(whole.context, torch.nan))
    velocity, _ = model.observe(of_row(given, other, 1), Intervention(inject_context=found.context))
    assert tiny_models.relative_error(velocity, by_hand(model, given, whole)) < 2e-6
    without = {layer: kv for layer, kv in found.context.items() if layer != 3}
    velocity, _ = model.observe(of_row(given, other, 1), Intervention(inject_context=without))
    assert velocity.isnan().any()
    for spared in ({"skip": frozenset({3})}, {"hide_context": frozenset({3})}):
        change = Intervention(inject_context=without, **spared)
        assert not model.observe(of_row(given, other, 1), change)[0].isnan().any()


def test_in_some_layers(model, given, whole, found):
    """The others have their own: layer by layer, against a pass with what each of them uses."""
    some = {layer: found.context[layer] for layer in VITAL}
    edit = of_row(given, whole, 1)
    velocity, after = model.observe(edit, Intervention(inject_context=some, keep_context=True))
    for layer in VITAL:
        assert all(torch.equal(x, y) for x, y in zip(after.context[layer], found.context[layer]))
    again, _ = model.observe(edit, Intervention(inject_context=after.context))
    assert_close(again, velocity, rtol=0, atol=2e-6)
    plain, _ = model.observe(edit)
    assert tiny_models.relative_error(velocity, plain) > 1e-3
    assert tiny_models.relative_error(velocity, by_hand(model, given, whole)) > 1e-3


def test_beside_kv_free_tokens_and_layers_that_hide(model, given, whole, found):
    """Noise tokens injected in vital layers, few of them computed, and the context hidden in two."""
    mask = torch.arange(TOKENS) % 5 < 2
    held = torch.cat((~mask, torch.ones(CONTEXT, dtype=torch.bool)))
    change = Intervention(
        inject={layer: found.kept[layer] for layer in VITAL},
        hide_context=frozenset({1, 4}),
        inject_context=found.context,
    )
    # What the reference's pass hands out is that of a pass that hides nothing.
    velocity, _ = model.observe(of_row(given, whole, 1), replace(change, hide_context=frozenset()))
    assert tiny_models.relative_error(velocity, by_hand(model, given, whole, VITAL)) < 2e-6
    kept = model.observe(of_row(given, whole, 0), replace(KEEP, hide_context=change.hide_context))[1]
    change = replace(
        change,
        inject={layer: kept.kept[layer] for layer in VITAL},
        inject_context=kept.context,
        free=replace(FreeTokens.of(mask), kv=kept.kept),
    )
    velocity, _ = model.observe(of_row(given, whole, 1), change)
    expected = by_hand(model, given, whole, VITAL, held, hidden=change.hide_context)
    assert tiny_models.relative_error(velocity[:, mask], expected[:, mask]) < 2e-6


@pytest.mark.parametrize("layers", [{1}, {4}, {0, 2, 5}], ids=str)
def test_beside_skipped_layers(model, given, whole, layers):
    """A skipped layer has no keys and values to keep, and needs none."""
    skip = Intervention(skip=frozenset(layers))
    kept = model.observe(Inputs(**given, condition=whole), replace(skip, keep_context=True))[1].context
    assert kept.keys() == EVERY - layers
    inputs = Inputs(**given, condition=whole)
    velocity, _ = model.observe(inputs, replace(skip, inject_context=kept))
    assert tiny_models.relative_error(velocity, model.observe(inputs, skip)[0]) < 2e-6


def test_streams_to_start_with(model, given, whole):
    inputs = Inputs(**given, condition=whole)
    velocity, found = model.observe(inputs, Intervention(keep_context=True))
    for start in model.streams(inputs):
        later = {layer: kv for layer, kv in found.context.items() if layer >= start.layer}
        again, _ = model.observe(inputs, Intervention(inject_context=later), start=start)
        assert tiny_models.relative_error(again, velocity) < 2e-6


def test_watched_tokens(model, given, whole):
    """The keys of all tokens, whether they are computed or injected."""
    inputs, watching = Inputs(**given, condition=whole), Intervention(watch=VITAL, keep_context=True)
    plain = model.observe(inputs, watching)[1]
    again = model.observe(inputs, Intervention(watch=VITAL, inject_context=plain.context))[1]
    for layer, pair in plain.watched.items():
        for x, y in zip(pair, again.watched[layer], strict=True):
            assert_close(y, x, rtol=0, atol=1e-5)


# ---- rows


def test_one_row_serves_a_batch_and_rows_are_chosen(model, given, whole, found):
    inputs = Inputs(**given, condition=whole)
    both = model.observe(inputs, Intervention(keep_context=True))[1]
    change = Intervention(inject_context=both.context)
    velocity, _ = model.observe(inputs, change)
    for row in (0, 1):
        alone, _ = model.observe(of_row(given, whole, row), change.at_rows([row], 2))
        assert_close(velocity[row : row + 1], alone, rtol=0, atol=5e-6)
        assert torch.equal(both.rows(slice(row, row + 1)).context[3][1], both.context[3][1][row : row + 1])
    one = Intervention(inject_context=found.context)
    stacked = one.stacked(Intervention(inject_context=found.context))
    served = [model.observe(inputs, change)[0] for change in (one, stacked)]
    assert torch.equal(*served)
    with pytest.raises(ValueError, match="in the same layers"):
        one.stacked(Intervention(keep_context=True))


def test_keys_and_values_that_do_not_fit(model, given, whole, found):
    wide = condition(1, TOKENS)
    longer = replace(wide, context=torch.cat((wide.context, wide.context), 1))
    longer = replace(longer, context_ids=torch.cat((wide.context_ids, wide.context_ids), 1))
    change = Intervention(inject_context=found.context)
    with pytest.raises(InputError, match=r"\(1, 2, 9, 16\)\] for layer 0: .* their tokens be 18"):
        model.observe(of_row(given, longer, 1), change)
    with pytest.raises(InputError, match="Got layers \\[7\\]"):
        model.observe(of_row(given, whole, 1), Intervention(inject_context={7: found.context[0]}))
