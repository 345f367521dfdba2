"""What an intervention does, each part against a definition of its own: zero gates, keys and values written
over by rows, one row at a time.
"""

import copy
import dataclasses

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from flux.errors import InputError
from flux.intervention import Intervention, check_layers
from flux.model import Inputs, Streams

LAYERS = range(tiny_models.NUM_LAYERS)
VITAL = frozenset({0, 2, 3, 6})
SIZE = (48, 80)
TOKENS = 15


def skip(*layers: int) -> Intervention:
    return Intervention(skip=frozenset(layers))


def skip_rows(*rows) -> Intervention:
    return Intervention(skip=tuple(frozenset(row) for row in rows))


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


def kept_by(model, given, rows=(0,), layers=VITAL):
    velocity, found = model.observe(
        Inputs(**tiny_models.rows_of(given, list(rows))), Intervention(keep=frozenset(layers))
    )
    return velocity, found.kept


# ---- nothing


def test_nothing_in_nothing_changed(model, given):
    """Bit for bit, so that a folder with this package in it gives the pictures it always gave."""
    plain = model(**given)
    assert torch.equal(model(**given, intervention=Intervention()), plain)
    assert torch.equal(model(**given, intervention=skip_rows((), (), ())), plain)
    velocity, found = model.observe(Inputs(**given))
    kept = found.kept
    assert torch.equal(velocity, plain)
    assert kept == {}


def test_it_is_a_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Intervention().skip = frozenset({1})


# ---- bypass


@pytest.mark.parametrize("layer", LAYERS)
def test_skip_is_the_zero_gate(model, given, layer):
    """A block whose modulation is zero adds nothing: an independent definition of bypass, equal bit for
    bit.
    """
    muted = copy.deepcopy(model)
    block = [*muted.double_blocks, *muted.single_blocks][layer]
    mods = [block.img_mod, block.txt_mod] if layer < tiny_models.NUM_DOUBLE else [block.modulation]
    for mod in mods:
        mod.lin.weight.data.zero_()
        mod.lin.bias.data.zero_()
    skipped = model(**given, intervention=skip(layer))
    assert torch.equal(skipped, muted(**given))
    assert (skipped - model(**given)).abs().max() > 0.01


def test_skipped_layers_are_not_computed(model, given):
    broken = copy.deepcopy(model)
    for layer in (1, 4):
        block = [*broken.double_blocks, *broken.single_blocks][layer]
        block.run = None
    assert torch.equal(broken(**given, intervention=skip(1, 4)), model(**given, intervention=skip(1, 4)))


def test_skipping_all_layers_leaves_the_ends(model, given):
    """No layer sees the image, so tokens do not mix: each answer depends on its own token only."""
    bare = model(**given, intervention=skip(*LAYERS))
    turned = {**given, "img": given["img"].flip(1)}
    assert_close(model(**turned, intervention=skip(*LAYERS)), bare.flip(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_with_sets_of_their_own(model, given, layer):
    """A row that bypasses a layer beside rows that do not equals the same row alone; the others do not
    notice.
    """
    mixed = model(**given, intervention=skip_rows({layer}, (), {layer, (layer + 1) % tiny_models.NUM_LAYERS}))
    alone = (skip(layer), skip(), skip(layer, (layer + 1) % tiny_models.NUM_LAYERS))
    for row, intervention in enumerate(alone):
        whole_batch = model(**given, intervention=intervention)
        assert torch.equal(mixed[row], whole_batch[row])
        one = model(**tiny_models.rows_of(given, [row]), intervention=intervention)
        assert_close(mixed[row : row + 1], one, rtol=0, atol=1e-5)


def test_a_bypassed_row_does_not_leak(model, given):
    """Not-a-number in one row stays in that row, also where the layer is computed for it in vain."""
    poisoned = {**given, "img": given["img"].clone()}
    poisoned["img"][1] = torch.nan
    mixed = model(**poisoned, intervention=skip_rows((), {2}, {2}))
    clean = model(**given, intervention=skip_rows((), {2}, {2}))
    assert torch.equal(mixed[[0, 2]], clean[[0, 2]])
    assert mixed[1].isnan().all()


def test_equal_sets_for_all_rows_are_one_set(model, given):
    assert torch.equal(
        model(**given, intervention=skip_rows({3}, {3}, {3})), model(**given, intervention=skip(3))
    )


# ---- scaled layers


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_half_a_layer_leaves_the_streams_halfway(model, given, layer):
    """Both of them, between what enters the layer and what it makes of that."""
    before, after = model.streams(Inputs(**given))[layer : layer + 2]
    halfway = Streams(layer + 1, (before.img + after.img) / 2, (before.txt + after.txt) / 2)
    expected, _ = model.observe(Inputs(**given), start=halfway)
    half = Intervention(skip=frozenset({layer}), skip_scale=0.5)
    assert_close(model(**given, intervention=half), expected, rtol=0, atol=2e-5)


def test_a_scale_of_one_changes_nothing(model, given):
    whole = Intervention(skip=frozenset(LAYERS), skip_scale=1.0)
    assert_close(model(**given, intervention=whole), model(**given), rtol=0, atol=5e-6)


def test_only_the_rows_that_skip_are_scaled(model, given):
    rows = tuple(frozenset(layers) for layers in ({2}, (), {2, 5}))
    mixed = model(**given, intervention=Intervention(skip=rows, skip_scale=0.5))
    for row, layers in enumerate(rows):
        whole_batch = model(**given, intervention=Intervention(skip=layers, skip_scale=0.5))
        assert torch.equal(mixed[row], whole_batch[row])


# ---- starting in the middle


def test_streams_are_those_into_each_layer(model, given):
    """The first come from the embedding alone; from each on, the rest of the pass is the whole pass."""
    streams = model.streams(Inputs(**given))
    assert [each.layer for each in streams] == list(LAYERS)
    assert torch.equal(streams[0].img, model.img_in(given["img"]))
    assert torch.equal(streams[0].txt, model.txt_in(given["txt"]))
    whole = model(**given)
    for start in streams:
        assert torch.equal(model.observe(Inputs(**given), start=start)[0], whole)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_bypass_may_start_at_its_layer(model, given, layer):
    """Nothing before the bypassed layer differs from the plain pass: what a sweep may share."""
    start, skipping = model.streams(Inputs(**given))[layer], skip(layer)
    from_start, _ = model.observe(Inputs(**given), intervention=skipping, start=start)
    assert torch.equal(from_start, model(**given, intervention=skipping))


def test_one_row_may_start_many(model, given):
    """The streams of one row serve a batch of it, each row with a set of its own."""
    one, alike = tiny_models.rows_of(given, [1]), tiny_models.rows_of(given, [1, 1, 1])
    start, rows = model.streams(Inputs(**one))[2], skip_rows({2}, {5}, ())
    from_start, _ = model.observe(Inputs(**alike), intervention=rows, start=start)
    assert_close(from_start, model(**alike, intervention=rows), rtol=0, atol=5e-6)


def test_layers_before_the_start_are_not_computed(model, given):
    start = model.streams(Inputs(**given))[4]
    broken = copy.deepcopy(model)
    for block in (*broken.double_blocks, broken.single_blocks[0]):
        block.run = None
    assert torch.equal(broken.observe(Inputs(**given), start=start)[0], model(**given))


# ---- keep


def test_keeping_changes_nothing(model, given):
    velocity, _ = model.observe(Inputs(**given), intervention=Intervention(keep=frozenset(LAYERS)))
    assert torch.equal(velocity, model(**given))


def test_kept_are_the_image_tokens_of_the_layers_asked_for(model, given):
    kept = model.observe(Inputs(**given), intervention=Intervention(keep=VITAL))[1].kept
    heads, size = tiny_models.PARAMS.num_heads, tiny_models.PARAMS.hidden_size // tiny_models.PARAMS.num_heads
    assert kept.keys() == VITAL
    for k, v in kept.values():
        assert k.shape == v.shape == (3, heads, TOKENS, size)


def test_kept_hold_no_more_memory_than_their_own(model, given):
    """A view would keep the whole projection, text and MLP and all, alive for as long as the step lasts."""
    kept = model.observe(Inputs(**given), intervention=Intervention(keep=frozenset(LAYERS)))[1].kept
    for pair in kept.values():
        for x in pair:
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_kept_are_normalised_and_turned_keys(model, given):
    """Keys as attention sees them, and plain values, worked out by hand in the first layer."""
    kept = model.observe(Inputs(**given), intervention=Intervention(keep=frozenset({0})))[1].kept
    block = model.double_blocks[0]
    vec = torch.nn.functional.silu(tiny_models.hand_vec(model, given))
    shift, scale, *_ = block.img_mod.lin(vec)[:, None].chunk(6, dim=-1)
    qkv = block.img_attn.qkv(tiny_models.hand_norm(model.img_in(given["img"])) * (1 + scale) + shift)
    _, k, v = qkv.unflatten(-1, (3, tiny_models.PARAMS.num_heads, -1)).permute(2, 0, 3, 1, 4)
    k = tiny_models.hand_rotation(
        tiny_models.hand_rms(k, block.img_attn.norm.key_norm.scale), given["img_ids"], tiny_models.PARAMS
    )
    assert_close(kept[0][0], k, rtol=0, atol=5e-6)
    assert_close(kept[0][1], v, rtol=0, atol=5e-6)


def test_taken_keys_are_what_is_kept(model, shared):
    """A layer that takes and keeps at once hands on what it used: edits can be references of further
    edits.
    """
    _, kept = kept_by(model, shared)
    both = Intervention(keep=VITAL, inject=kept)
    kept_again = model.observe(Inputs(**tiny_models.rows_of(shared, [1, 2])), intervention=both)[1].kept
    for layer, pair in kept.items():
        for first, second in zip(pair, kept_again[layer]):
            assert torch.equal(first.expand_as(second), second)


# ---- watch


def test_watched_are_queries_and_keys_of_all_tokens(model, given):
    """Text first; the image's keys are those that would be kept. Watching changes nothing."""
    velocity, found = model.observe(Inputs(**given), intervention=Intervention(keep=VITAL, watch=VITAL))
    assert torch.equal(velocity, model(**given))
    assert found.watched.keys() == VITAL
    num_txt = given["txt"].shape[1]
    for layer, (q, k) in found.watched.items():
        assert q.shape == k.shape
        assert q.shape[2] == num_txt + TOKENS
        assert torch.equal(k[:, :, num_txt:], found.kept[layer][0])
    alone = model.observe(Inputs(**given), intervention=Intervention(watch=VITAL))[1]
    assert alone.watched.keys() == VITAL
    assert not alone.kept


# ---- take


@pytest.mark.parametrize("layer", LAYERS)
def test_taking_ones_own_changes_nothing(model, given, layer):
    """Up to rounding: queries and the MLP are then projected apart from keys and values."""
    velocity, kept = kept_by(model, given, rows=(0, 1, 2), layers={layer})
    assert_close(model(**given, intervention=Intervention(inject=kept)), velocity, rtol=0, atol=5e-6)


@pytest.mark.parametrize("layers", [{0}, {3}, VITAL, set(LAYERS)], ids=str)
def test_take_is_writing_over_keys_and_values_by_rows(model, shared, layers):
    """The method as its paper states it: in one batch, row 0's image keys and values written over those of
    the others before the rotary embedding. Two passes with a hand-over give the same.
    """
    by_rows = tiny_models.hand_forward(model, shared, inject=frozenset(layers))
    reference, kept = kept_by(model, shared, layers=layers)
    edits = model(**tiny_models.rows_of(shared, [1, 2]), intervention=Intervention(inject=kept))
    error = tiny_models.relative_error(torch.cat((reference, edits)), by_rows)
    assert error < 1e-6, f"relative error {error:.1e}"
    plain = model(**tiny_models.rows_of(shared, [1, 2]))
    assert (edits - plain).abs().max() > 0.1, "the injection did nothing"


def test_text_keys_and_values_stay_the_rows_own(model, shared):
    """With another text, the rows that take from the same reference still differ."""
    _, kept = kept_by(model, shared, layers=LAYERS)
    alike = tiny_models.rows_of(shared, [1, 1])
    alike["txt"] = shared["txt"][[1, 2]]
    velocity = model(**alike, intervention=Intervention(inject=kept))
    assert (velocity[0] - velocity[1]).abs().max() > 0.1


def test_projections_of_taken_keys_and_values_are_not_computed(model, shared):
    """Not-a-number in the rows of the weights that make image keys and values must not be noticed."""
    _, kept = kept_by(model, shared, layers={1})
    broken = copy.deepcopy(model)
    broken.double_blocks[1].img_attn.qkv.weight.data[tiny_models.PARAMS.hidden_size :] = torch.nan
    edits, taking = tiny_models.rows_of(shared, [1, 2]), Intervention(inject=kept)
    assert torch.equal(broken(**edits, intervention=taking), model(**edits, intervention=taking))


def test_edits_leave_what_they_take_untouched(model, shared):
    _, kept = kept_by(model, shared)
    before = copy.deepcopy(kept)
    model(**tiny_models.rows_of(shared, [1, 2]), intervention=Intervention(inject=kept))
    for layer in VITAL:
        for now, then in zip(kept[layer], before[layer]):
            assert torch.equal(now, then)


def test_a_batch_of_identical_rows_stays_identical(model, shared):
    """Rows equal to the reference, taking from it, answer as the reference does."""
    reference, kept = kept_by(model, shared)
    same = tiny_models.rows_of(shared, [0, 0, 0])
    velocity = model(**same, intervention=Intervention(inject=kept))
    assert_close(velocity, reference.expand_as(velocity), rtol=0, atol=5e-6)


def test_order_and_number_of_edits_do_not_matter(model, shared):
    _, kept = kept_by(model, shared)
    taking = Intervention(inject=kept)
    edits = model(**tiny_models.rows_of(shared, [1, 2]), intervention=taking)
    turned = model(**tiny_models.rows_of(shared, [2, 1]), intervention=taking)
    assert_close(turned.flip(0), edits, rtol=0, atol=5e-6)
    alone = model(**tiny_models.rows_of(shared, [2]), intervention=taking)
    assert_close(alone, edits[1:], rtol=0, atol=5e-6)


def test_several_references_serve_their_own_edits(model, shared):
    """Two references, four edits: the first two take from the first, the last two from the second."""
    _, kept = kept_by(model, shared, rows=(0, 1))
    edits = tiny_models.rows_of(shared, [2, 1, 0, 2])
    together = model(**edits, intervention=Intervention(inject=kept))
    for source, rows in ((0, [0, 1]), (1, [2, 3])):
        own = {layer: tuple(x[source : source + 1] for x in pair) for layer, pair in kept.items()}
        alone = model(**tiny_models.rows_of(edits, rows), intervention=Intervention(inject=own))
        assert_close(together[rows], alone, rtol=0, atol=5e-6)


def test_skip_keep_and_take_together(model, shared):
    """Bypassing one layer for some rows while others take: each row as alone."""
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
    """The velocity where one layer's image keys and values are own + weight * (row 0's - own): taken whole,
    from a blend that is made beforehand.
    """
    _, own = kept_by(model, given, rows=(0, 1, 2), layers={layer})
    blend = []
    for part, x in zip("kv", own[layer]):
        share = weight if part in parts else torch.zeros(())
        blend.append(x + share * (x[:1] - x))
    return model(**given, intervention=Intervention(inject={layer: tuple(blend)}))


@pytest.mark.parametrize("layer", [0, 2, 3, 6])
@pytest.mark.parametrize("parts", ["kv", "k", "v"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_weights_blend_with_ones_own(model, given, layer, weight, parts):
    _, kept = kept_by(model, given, layers={layer})
    pair = tuple(x if part in parts else None for part, x in zip("kv", kept[layer]))
    got = model(**given, intervention=Intervention(inject={layer: pair}, inject_weights={layer: weight}))
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
    first = Intervention(skip, keep=frozenset({2}), inject={0: (k, None)}, inject_weights={0: weight, 3: 0.5})
    both = first.stacked(dataclasses.replace(first, inject={0: (k + 1, None)}))
    assert both.skip == skip * 2
    assert both.keep == {2}
    assert torch.equal(both.inject[0][0], torch.cat((k, k + 1)))
    assert both.inject[0][1] is None
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


@pytest.mark.parametrize(
    "intervention", [skip(7), skip(-1), skip_rows((), {57}, ()), Intervention(keep=frozenset({99}))], ids=str
)
def test_layers_that_are_not_there(model, given, intervention):
    with pytest.raises(InputError, match=r"this model numbers its layers 0\.\.6"):
        model(**given, intervention=intervention)


def test_taking_in_a_layer_that_is_not_there(model, given):
    _, kept = kept_by(model, given)
    with pytest.raises(InputError, match=r"\[7\]"):
        model(**given, intervention=Intervention(inject={7: kept[0]}))


def test_a_set_of_layers_too_many(model, given):
    with pytest.raises(InputError, match=r"2 sets.*\b3\b"):
        model(**given, intervention=skip_rows({1}, {2}))


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
def test_keys_and_values_of_another_size_of_picture(model, given, layer):
    """Else double-stream blocks would attend to them without a word, and pictures would be quietly wrong."""
    kept = model.observe(
        Inputs(**tiny_models.inputs(1, 64, 64)), intervention=Intervention(keep=frozenset({layer}))
    )[1].kept
    with pytest.raises(InputError):
        model(**given, intervention=Intervention(inject=kept))


def test_check_layers_names_the_wrong_ones():
    check_layers([0, 56], 57)
    with pytest.raises(InputError, match=r"\[-1, 57\].*0\.\.56"):
        check_layers([57, 3, -1], 57)
