"""Injected keys, values and queries, against a forward pass by hand that writes them over by rows."""

import copy
import dataclasses

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Inputs

LAYERS = range(tiny_models.NUM_LAYERS)
VITAL = frozenset({0, 2, 3, 6})
SIZE = (48, 80)
TOKENS = 15


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def given():
    """Three rows with texts, noise, noise levels and guidance of their own."""
    return tiny_models.inputs(3, *SIZE)


@pytest.fixture(scope="module")
def shared(given):
    """Three rows with texts of their own, at one noise level."""
    return {**given, "timesteps": given["timesteps"][:1].expand(3)}


def kept_by(model, given, rows=(0,), layers=VITAL, parts="kv"):
    """The velocity, and by layer keys, values and queries, of which those that `parts` lacks are None."""
    layers = frozenset(layers)
    keep = Intervention(keep=layers, keep_queries=layers if "q" in parts else frozenset())
    velocity, found = model.observe(Inputs(**tiny_models.rows_of(given, list(rows))), keep)
    return velocity, {
        layer: tuple(x if part in parts else None for part, x in zip("kvq", kept))
        for layer, kept in found.kept.items()
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_injecting_ones_own_changes_nothing(model, given, layer):
    """Up to rounding: queries and the MLP are then projected apart from keys and values."""
    velocity, kept = kept_by(model, given, rows=(0, 1, 2), layers={layer})
    assert_close(model(**given, intervention=Intervention(inject=kept)), velocity, rtol=0, atol=5e-6)


@pytest.mark.parametrize("parts", ["kv", "q", "kvq"])
@pytest.mark.parametrize("layers", [{0}, {3}, VITAL, set(LAYERS)], ids=str)
def test_injecting_is_writing_over_keys_and_values_by_rows(model, shared, layers, parts):
    """The method as its paper states it: in one batch, row 0's image keys and values written over those of
    the others before the rotary embedding. Two passes with a hand-over give the same. So it is with queries.
    """
    by_rows = tiny_models.hand_forward(model, shared, inject=frozenset(layers), parts=parts)
    reference, kept = kept_by(model, shared, layers=layers, parts=parts)
    edits = model(**tiny_models.rows_of(shared, [1, 2]), intervention=Intervention(inject=kept))
    error = tiny_models.relative_error(torch.cat((reference, edits)), by_rows)
    assert error < 1e-6, f"relative error {error:.1e}"
    plain = model(**tiny_models.rows_of(shared, [1, 2]))
    assert (edits - plain).abs().max() > 0.1, "the injection did nothing"


def test_queries_of_ones_own_change_no_bit(model, given):
    """Injected in all layers, in a pass that computes keys and values as a plain one does."""
    velocity, kept = kept_by(model, given, rows=(0, 1, 2), layers=LAYERS, parts="q")
    assert torch.equal(model(**given, intervention=Intervention(inject=kept)), velocity)


def test_all_parts_in_all_layers_are_the_reference(model, given):
    """The same prompt and latent, and everything the image's attention is made of: the reference's bits,
    where its own pass projects queries, keys and values apart, as passes that inject do.
    """
    row = tiny_models.rows_of(given, [0])
    own = Intervention(inject=kept_by(model, given, layers=LAYERS)[1])
    every = frozenset(LAYERS)
    reference, found = model.observe(Inputs(**row), dataclasses.replace(own, keep=every, keep_queries=every))
    assert torch.equal(model(**row, intervention=Intervention(inject=found.kept)), reference)


def test_queries_are_kept_only_where_they_are_asked_for(model, given):
    keep = Intervention(keep=VITAL, keep_queries=frozenset({2}))
    kept = model.observe(Inputs(**given), keep)[1].kept
    assert {layer: len(parts) for layer, parts in kept.items()} == {0: 2, 2: 3, 3: 2, 6: 2}
    assert torch.equal(kept[2][0], kept_by(model, given, rows=(0, 1, 2))[1][2][0])


def test_text_keys_and_values_stay_the_rows_own(model, shared):
    """With another text, the rows that inject from the same reference still differ."""
    _, kept = kept_by(model, shared, layers=LAYERS)
    alike = tiny_models.rows_of(shared, [1, 1])
    alike["txt"] = shared["txt"][[1, 2]]
    velocity = model(**alike, intervention=Intervention(inject=kept))
    assert (velocity[0] - velocity[1]).abs().max() > 0.1


def test_projections_of_replaced_keys_and_values_are_not_computed(model, shared):
    """Not-a-number in the rows of the weights that make image keys and values must not be noticed."""
    _, kept = kept_by(model, shared, layers={1})
    broken = copy.deepcopy(model)
    broken.double_blocks[1].img_attn.qkv.weight.data[tiny_models.PARAMS.hidden_size :] = torch.nan
    edits, inject = tiny_models.rows_of(shared, [1, 2]), Intervention(inject=kept)
    assert torch.equal(broken(**edits, intervention=inject), model(**edits, intervention=inject))


def test_edits_do_not_change_what_they_inject(model, shared):
    _, kept = kept_by(model, shared)
    before = copy.deepcopy(kept)
    model(**tiny_models.rows_of(shared, [1, 2]), intervention=Intervention(inject=kept))
    for layer in VITAL:
        for now, then in zip(kept[layer], before[layer]):
            assert torch.equal(now, then)


def test_a_batch_of_identical_rows_stays_identical(model, shared):
    """Rows equal to the reference, injecting from it, answer as the reference does."""
    reference, kept = kept_by(model, shared)
    same = tiny_models.rows_of(shared, [0, 0, 0])
    velocity = model(**same, intervention=Intervention(inject=kept))
    assert_close(velocity, reference.expand_as(velocity), rtol=0, atol=5e-6)


def test_order_and_number_of_edits_do_not_matter(model, shared):
    _, kept = kept_by(model, shared)
    inject = Intervention(inject=kept)
    edits = model(**tiny_models.rows_of(shared, [1, 2]), intervention=inject)
    turned = model(**tiny_models.rows_of(shared, [2, 1]), intervention=inject)
    assert_close(turned.flip(0), edits, rtol=0, atol=5e-6)
    alone = model(**tiny_models.rows_of(shared, [2]), intervention=inject)
    assert_close(alone, edits[1:], rtol=0, atol=5e-6)


def test_several_references_serve_their_own_edits(model, shared):
    """Two references, four edits: the first two inject from the first, the last two from the second."""
    _, kept = kept_by(model, shared, rows=(0, 1))
    edits = tiny_models.rows_of(shared, [2, 1, 0, 2])
    together = model(**edits, intervention=Intervention(inject=kept))
    for source, rows in ((0, [0, 1]), (1, [2, 3])):
        own = {layer: tuple(x[source : source + 1] for x in pair) for layer, pair in kept.items()}
        alone = model(**tiny_models.rows_of(edits, rows), intervention=Intervention(inject=own))
        assert_close(together[rows], alone, rtol=0, atol=5e-6)


def test_skipping_and_injecting_together(model, shared):
    """One row skips a layer while both inject: each as alone."""
    _, kept = kept_by(model, shared)
    edits = tiny_models.rows_of(shared, [1, 2])
    both = model(**edits, intervention=Intervention(skip=(frozenset({2}), frozenset()), inject=kept))
    first = model(
        **tiny_models.rows_of(edits, [0]), intervention=Intervention(skip=frozenset({2}), inject=kept)
    )
    second = model(**tiny_models.rows_of(edits, [1]), intervention=Intervention(inject=kept))
    assert_close(both, torch.cat((first, second)), rtol=0, atol=5e-6)


# ---- weights


def hand_blend(model, given, layer, weight, parts="kv"):
    """The velocity where one layer's image keys, values and queries are own + weight * (row 0's - own):
    wholly injected from a blend that is made beforehand.
    """
    _, own = kept_by(model, given, rows=(0, 1, 2), layers={layer}, parts="kvq")
    blend = []
    for part, x in zip("kvq", own[layer]):
        share = weight if part in parts else torch.zeros(())
        blend.append(x + share * (x[:1] - x))
    return model(**given, intervention=Intervention(inject={layer: tuple(blend)}))


@pytest.mark.parametrize("layer", [0, 6], ids=["double", "single"])
@pytest.mark.parametrize("parts", ["kv", "k", "v", "q", "vq", "kvq"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_weights_blend_with_ones_own(model, given, layer, weight, parts):
    _, kept = kept_by(model, given, layers={layer}, parts=parts)
    got = model(**given, intervention=Intervention(inject=kept, inject_weights={layer: weight}))
    assert_close(got, hand_blend(model, given, layer, torch.tensor(weight), parts), rtol=0, atol=5e-6)


@pytest.mark.parametrize("layer", [1, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_of_each_image_token(model, given, layer, rows):
    """One row of them for all, or one for each."""
    weight = torch.rand(rows, TOKENS, generator=torch.Generator().manual_seed(1))
    _, kept = kept_by(model, given, layers={layer})
    got = model(**given, intervention=Intervention(inject=kept, inject_weights={layer: weight}))
    expected = hand_blend(model, given, layer, weight[:, None, :, None])
    assert_close(got, expected, rtol=0, atol=5e-6)


def test_no_weight_changes_nothing(model, given):
    _, kept = kept_by(model, given)
    none = Intervention(inject=kept, inject_weights=dict.fromkeys(VITAL, 0.0))
    assert_close(model(**given, intervention=none), model(**given), rtol=0, atol=5e-6)


@pytest.mark.parametrize("layer", [1, 5])
def test_ones_own_are_projected_only_where_something_of_them_is_left(model, given, layer, monkeypatch):
    """A weight of 1 is the same as none named: bit for bit, and no more work."""
    whole = Intervention(inject=kept_by(model, given, layers={layer})[1])
    block = [*model.double_blocks, *model.single_blocks][layer]
    projection = block.img_attn.qkv if layer < tiny_models.NUM_DOUBLE else block.linear1
    plain = model(**given, intervention=whole)
    calls = []
    handle = projection.register_forward_hook(lambda *args: calls.append(args))
    try:
        full = dataclasses.replace(whole, inject_weights={layer: 1.0})
        assert torch.equal(model(**given, intervention=full), plain)
        assert not calls
        model(**given, intervention=dataclasses.replace(whole, inject_weights={layer: 0.5}))
        assert len(calls) == 1
    finally:
        handle.remove()


def test_two_interventions_as_one_batch():
    """Sets of layers, injected rows, and weights of tokens stand for the first rows, then for the last."""
    k, weight = torch.zeros(1, 2, TOKENS, 4), torch.rand(1, TOKENS)
    skip = (frozenset({1}), frozenset())
    inject = {0: (k, None), 1: (None, None, k)}
    first = Intervention(skip, keep=frozenset({2}), inject=inject, inject_weights={0: weight, 3: 0.5})
    both = first.stacked(dataclasses.replace(first, inject={0: (k + 1, None), 1: (None, None, k + 2)}))
    assert both.skip == skip * 2
    assert both.keep == {2}
    assert torch.equal(both.inject[0][0], torch.cat((k, k + 1)))
    assert both.inject[0][1] is None
    assert both.inject[1][:2] == (None, None)
    assert torch.equal(both.inject[1][2], torch.cat((k, k + 2)))
    assert torch.equal(both.inject_weights[0], torch.cat((weight, weight)))
    assert both.inject_weights[3] == 0.5
    with pytest.raises(ValueError, match="one batch"):
        first.stacked(Intervention())


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_weights_that_are_none(model, given, weight):
    _, kept = kept_by(model, given)
    with pytest.raises(InputError, match=r"layer 1: expected 0\.\.1"):
        model(**given, intervention=Intervention(inject=kept, inject_weights={1: weight}))


@pytest.mark.parametrize("shape", [(2, TOKENS), (1, TOKENS + 1), (TOKENS,)])
def test_weights_of_other_shapes(model, given, shape):
    _, kept = kept_by(model, given)
    with pytest.raises(InputError, match="weights of shape"):
        model(**given, intervention=Intervention(inject=kept, inject_weights={1: torch.zeros(shape)}))


# ---- what is refused


def test_injecting_in_a_layer_that_is_not_there(model, given):
    _, kept = kept_by(model, given)
    with pytest.raises(InputError, match=r"\[7\]"):
        model(**given, intervention=Intervention(inject={7: kept[0]}))


def test_references_that_do_not_divide_the_batch(model, given):
    _, kept = kept_by(model, given, rows=(0, 1))
    with pytest.raises(InputError, match="divide the batch"):
        model(**given, intervention=Intervention(inject=kept))


def test_keys_and_values_that_do_not_belong_together(model, given):
    _, kept = kept_by(model, given)
    k, v = kept[0]
    with pytest.raises(InputError, match="equal"):
        model(**given, intervention=Intervention(inject={0: (k, v[:, :, :-1])}))


@pytest.mark.parametrize("layer", [0, 5])
def test_keys_and_values_of_another_image_size(model, given, layer):
    """Else double-stream blocks would attend to them without an error, and images would be wrong."""
    kept = model.observe(
        Inputs(**tiny_models.inputs(1, 64, 64)), intervention=Intervention(keep=frozenset({layer}))
    )[1].kept
    with pytest.raises(InputError, match="their tokens be 15"):
        model(**given, intervention=Intervention(inject=kept))
