"""Skipped, kept and watched layers, each against an independent definition."""

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
    """Bit for bit, so that a folder with this package in it gives the images it always gave."""
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


# ---- skip


@pytest.mark.parametrize("layer", LAYERS)
def test_skip_is_the_zero_gate(model, given, layer):
    """A block whose modulation is zero adds nothing: an independent definition of skipping, equal bit for
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
    """A row that skips a layer beside rows that do not equals the same row alone, and so do the others."""
    mixed = model(**given, intervention=skip_rows({layer}, (), {layer, (layer + 1) % tiny_models.NUM_LAYERS}))
    alone = (skip(layer), skip(), skip(layer, (layer + 1) % tiny_models.NUM_LAYERS))
    for row, intervention in enumerate(alone):
        whole_batch = model(**given, intervention=intervention)
        assert torch.equal(mixed[row], whole_batch[row])
        one = model(**tiny_models.rows_of(given, [row]), intervention=intervention)
        assert_close(mixed[row : row + 1], one, rtol=0, atol=1e-5)


def test_a_skipped_row_does_not_leak(model, given):
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
def test_a_pass_may_start_at_the_skipped_layer(model, given, layer):
    """Nothing before the skipped layer differs from the plain pass: what a sweep may share."""
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
    velocity, _ = model.observe(Inputs(**given), Intervention(keep=frozenset(LAYERS)))
    assert torch.equal(velocity, model(**given))


def test_kept_are_the_image_tokens_of_the_layers_asked_for(model, given):
    kept = model.observe(Inputs(**given), Intervention(keep=VITAL))[1].kept
    heads, size = tiny_models.PARAMS.num_heads, tiny_models.PARAMS.hidden_size // tiny_models.PARAMS.num_heads
    assert kept.keys() == VITAL
    for k, v in kept.values():
        assert k.shape == v.shape == (3, heads, TOKENS, size)


def test_kept_hold_no_more_memory_than_their_own(model, given):
    """A view would keep the whole projection, text and MLP and all, alive for as long as the step lasts."""
    kept = model.observe(Inputs(**given), Intervention(keep=frozenset(LAYERS)))[1].kept
    for pair in kept.values():
        for x in pair:
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_kept_are_normalised_and_turned_keys(model, given):
    """Keys as attention sees them, and plain values, worked out by hand in the first layer."""
    kept = model.observe(Inputs(**given), Intervention(keep=frozenset({0})))[1].kept
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


def test_injected_keys_are_what_is_kept(model, shared):
    """A layer that injects and keeps hands out what it used: edits can be references of further edits."""
    _, kept = kept_by(model, shared)
    both = Intervention(keep=VITAL, inject=kept)
    kept_again = model.observe(Inputs(**tiny_models.rows_of(shared, [1, 2])), intervention=both)[1].kept
    for layer, pair in kept.items():
        for first, second in zip(pair, kept_again[layer]):
            assert torch.equal(first.expand_as(second), second)


# ---- watch


def test_watched_are_queries_and_keys_of_all_tokens(model, given):
    """Text first; the image's keys are those that would be kept. Watching changes nothing."""
    velocity, found = model.observe(Inputs(**given), Intervention(keep=VITAL, watch=VITAL))
    assert torch.equal(velocity, model(**given))
    assert found.watched.keys() == VITAL
    num_txt = given["txt"].shape[1]
    for layer, (q, k) in found.watched.items():
        assert q.shape == k.shape
        assert q.shape[2] == num_txt + TOKENS
        assert torch.equal(k[:, :, num_txt:], found.kept[layer][0])
    alone = model.observe(Inputs(**given), Intervention(watch=VITAL))[1]
    assert alone.watched.keys() == VITAL
    assert not alone.kept


# ---- what is refused


@pytest.mark.parametrize(
    "intervention", [skip(7), skip(-1), skip_rows((), {57}, ()), Intervention(keep=frozenset({99}))], ids=str
)
def test_layers_that_are_not_there(model, given, intervention):
    with pytest.raises(InputError, match=r"this model numbers its layers 0\.\.6"):
        model(**given, intervention=intervention)


def test_a_set_of_layers_too_many(model, given):
    with pytest.raises(InputError, match=r"2 sets.*\b3\b"):
        model(**given, intervention=skip_rows({1}, {2}))


def test_check_layers_names_the_wrong_ones():
    check_layers([0, 56], 57)
    with pytest.raises(InputError, match=r"\[-1, 57\].*0\.\.56"):
        check_layers([57, 3, -1], 57)
