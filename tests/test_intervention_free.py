"""Passes that compute some image tokens alone, against a forward pass by hand that computes all of them."""

import dataclasses

import pytest
import torch
from helpers import tiny_models
from torch.testing import assert_close

from flux.errors import InputError
from flux.intervention import FreeTokens, Intervention
from flux.model import Inputs
from flux.modules.step_cache import StepCache
from flux.sampling import Conditioning, euler_step

EVERY = frozenset(range(tiny_models.NUM_LAYERS))
VITAL = (0, 2, 3, 6)
SIZE = (48, 80)
TOKENS = 15
MASKS = {
    "one token": torch.arange(TOKENS) == 8,
    "a block": (torch.arange(TOKENS) % 5 < 2),
    "all but one": torch.arange(TOKENS) > 0,
}


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def given():
    """A reference and two edits with texts and latents of their own, at one noise level."""
    rows = tiny_models.inputs(3, *SIZE)
    return {**rows, "timesteps": rows["timesteps"][:1].expand(3)}


@pytest.fixture(scope="module")
def kept(model, given):
    """The keys, values and queries of row 0 in all layers."""
    reference = Inputs(**tiny_models.rows_of(given, [0]))
    return model.observe(reference, Intervention(keep=EVERY, keep_queries=EVERY))[1].kept


def free(mask, kept) -> FreeTokens:
    return dataclasses.replace(FreeTokens.of(mask), kv=kept)


def edits_of(model, given, intervention, rows=(1, 2)):
    return model(**tiny_models.rows_of(given, list(rows)), intervention=intervention)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("layers", "parts"), [((), "kv"), (VITAL, "kv"), (VITAL, "qkv")], ids=str)
def test_the_others_are_row_0s_in_all_layers(model, given, kept, name, layers, parts):
    """By hand, all tokens are computed and those that are not free are written over in every layer. Measured
    6e-7 at most.
    """
    mask = MASKS[name]
    by_hand = tiny_models.hand_forward(model, given, frozenset(layers), held=~mask, parts=parts)[1:]
    inject = {layer: kept[layer][: len(parts)] for layer in layers}
    velocity = edits_of(model, given, Intervention(inject=inject, free=free(mask, kept)))
    assert tiny_models.relative_error(velocity[:, mask], by_hand[:, mask]) < 2e-6
    assert not velocity[:, ~mask].any()
    plain = tiny_models.hand_forward(model, given, frozenset(layers), parts=parts)[1:]
    assert tiny_models.relative_error(plain[:, mask], by_hand[:, mask]) > 1e-3, "the others do nothing"


@pytest.mark.parametrize("weight", [0.3, 0.0, torch.linspace(0, 1, TOKENS)[None]], ids=str)
def test_weights_count_for_the_free_tokens(model, given, kept, weight):
    """As in a whole pass in which all of the others' keys and values have the weight 1 in every layer."""
    mask = MASKS["a block"]
    outside = (~mask).float()[None]
    weights = {n: outside + mask * weight if n in VITAL else outside for n in EVERY}
    whole = edits_of(model, given, Intervention(inject=kept, inject_weights=weights))
    inject = {n: kept[n] for n in VITAL}
    some = Intervention(inject=inject, inject_weights=dict.fromkeys(VITAL, weight), free=free(mask, kept))
    assert tiny_models.relative_error(edits_of(model, given, some)[:, mask], whole[:, mask]) < 2e-6


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_keys_or_values_alone(model, given, kept, part):
    """In layer 0, where an edit's own are known: those of a plain pass."""
    mask = MASKS["a block"]
    own = model.observe(Inputs(**tiny_models.rows_of(given, [1])), Intervention(keep=EVERY))[1].kept[0]
    alone = tuple(x if number == part else None for number, x in enumerate(kept[0][:2]))
    both = tuple(x if number == part else own[number] for number, x in enumerate(kept[0][:2]))
    got, wanted = (
        edits_of(model, given, Intervention(inject={0: pair}, free=free(mask, kept)), rows=[1])
        for pair in (alone, both)
    )
    assert_close(got, wanted, rtol=0, atol=5e-6)


def test_rows_of_several_references(model, given):
    """Each edit with its own reference's keys and values, as alone."""
    mask = MASKS["a block"]
    both = model.observe(Inputs(**tiny_models.rows_of(given, [0, 1])), Intervention(keep=EVERY))[1].kept
    together = edits_of(model, given, Intervention(free=free(mask, both)), rows=[2, 2, 1, 1])
    for source, rows in ((0, [2, 2]), (1, [1, 1])):
        own = {n: tuple(x[source : source + 1] for x in kv) for n, kv in both.items()}
        alone = edits_of(model, given, Intervention(free=free(mask, own)), rows=rows)
        assert_close(together[2 * source :][:2], alone, rtol=0, atol=5e-6)


def test_true_guidance_in_free_tokens(model, given, kept):
    """Both passes have their own others; outside, the velocity is 0."""
    mask = MASKS["a block"]
    rows = [tiny_models.rows_of(given, [row]) for row in (1, 2)]
    positive, negative = (Conditioning(row["txt"], row["txt_ids"], row["y"], row["guidance"]) for row in rows)
    cond = dataclasses.replace(positive, negative=negative, true_cfg=2.0)
    latent, ids, t = rows[0]["img"], rows[0]["img_ids"], given["timesteps"][0].item()
    step = euler_step(model, latent, ids, cond, t, t - 0.1, Intervention(free=free(mask, kept)))
    each = [
        euler_step(model, latent, ids, one, t, t - 0.1, Intervention(free=free(mask, kept))).velocity
        for one in (positive, negative)
    ]
    assert_close(step.velocity, each[1] + 2 * (each[0] - each[1]), rtol=0, atol=1e-5)
    assert not step.velocity[:, ~mask].any()


def test_streamed_compiled_and_8_bit_blocks(model, given, kept):
    """One graph serves every size of the mask after the first two."""
    from flux.runtime.offload import Offloaded
    from flux.runtime.quantize import to_fp8

    expected = [edits_of(model, given, Intervention(free=free(mask, kept))) for mask in MASKS.values()]
    streamed = tiny_models.flux()
    stacks = [streamed.double_blocks, streamed.single_blocks]
    with Offloaded(streamed, torch.device("cpu"), stacks, streamed=5).on_device():
        for mask, answer in zip(MASKS.values(), expected):
            assert torch.equal(edits_of(streamed, given, Intervention(free=free(mask, kept))), answer)
    eight_bit = tiny_models.flux()
    to_fp8([eight_bit.double_blocks, eight_bit.single_blocks])
    mask = MASKS["a block"]
    answer = edits_of(eight_bit, given, Intervention(free=free(mask, kept)))
    assert 0 < tiny_models.relative_error(answer, expected[1]) < 0.2


def test_masks_of_many_sizes_compile_few_graphs(given, kept):
    """The size of the mask is a variable of the graph."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_models.flux()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        for size in (4, 6, 7, 9, 10, 12):
            mask = torch.arange(TOKENS) < size
            edits_of(model, given, Intervention(free=free(mask, kept)))
    assert len(graphs) <= 2 * 2


# ---- what is refused, and what is left alone


def test_keys_and_values_of_all_layers_are_needed(model, given, kept):
    some = {layer: kept[layer] for layer in VITAL}
    with pytest.raises(InputError, match=r"layers \[1, 4, 5\]"):
        edits_of(model, given, Intervention(free=free(MASKS["a block"], some)))


def test_the_step_cache_takes_no_part(model, given, kept):
    cache = StepCache(10.0)
    some = Intervention(free=free(MASKS["a block"], kept))
    assert not some.is_plain
    for _ in range(2):
        model.observe(Inputs(**tiny_models.rows_of(given, [1])), some, cache=cache)
    assert not cache.full
    assert not cache.reused


def test_parts_of_an_intervention(kept):
    """Rows have their own reference's part; a row for all stays as it is."""
    weight = torch.rand(4, TOKENS)
    kv = torch.arange(2.0)[:, None, None, None].expand(2, 1, TOKENS, 1)
    whole = Intervention(inject={1: (kv, None), 2: kept[2]}, inject_weights={1: weight, 2: 0.5})
    part = whole.at_rows([1, 2], 4)
    assert part.inject[1][0][:, 0, 0, 0].tolist() == [0, 1]
    assert part.inject[1][1] is None
    assert part.inject[2][0] is kept[2][0]
    assert torch.equal(part.inject_weights[1], weight[1:3])
    assert part.inject_weights[2] == 0.5
    places = torch.tensor([0, 7])
    assert torch.equal(whole.at_tokens(places).inject_weights[1], weight[:, places])
    with pytest.raises(ValueError, match="each row"):
        Intervention(skip=(frozenset(), frozenset())).at_rows([0], 2)
    other = Intervention(free=free(MASKS["a block"], kept))
    with pytest.raises(ValueError, match="all tokens"):
        other.stacked(other)
