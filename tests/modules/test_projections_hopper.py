"""Hopper blocks answer like plain ones: with stand-ins for the packages, and on a GPU with the real ones."""

import gc
import sys
import types
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import conditions, hopper_stub, tiny_models

from flux.inputs import Condition, Inputs
from flux.intervention import FreeTokens, Intervention
from flux.model import hopper_kernels
from flux.modules.layers import Block, SingleStreamBlock
from flux.modules.linear import LowRankLinear
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import to_fp8

LAYERS = frozenset((1, 4))
SMALL = {"height": 32, "width": 32, "num_txt": 3}
WIDER = {"hidden_size": 64, "axes_dim": [8, 12, 12]}  # heads of a size that the kernels know


@pytest.fixture
def hopper(monkeypatch):
    """The module, imported with stand-ins for the packages; its blocks use their kernels on the CPU too."""
    hopper_stub.install(monkeypatch)
    from flux.modules import projections_hopper

    monkeypatch.setattr(projections_hopper, "has_kernel", lambda x: True)
    yield projections_hopper
    hopper_stub.forget()


def with_kernels(model, hopper):
    for block in model.blocks:
        hopper.use_hopper(block)
    return model


def condition(batch: int, **changes) -> Condition:
    """A context image and text tokens, for the model without further channels."""
    whole = conditions.condition(batch, 4)
    return replace(whole, channels=None, context=whole.context[..., :64].contiguous(), **changes)


def ways(batch: int, steered: Condition) -> dict[str, Intervention]:
    """Every way a block is called: plain, recording, skipped by rows, injecting all or some."""
    every = frozenset(range(tiny_models.NUM_LAYERS))
    reference = Inputs(**tiny_models.inputs(1, seed=3, **SMALL))
    keep = Intervention(keep=every, keep_queries=LAYERS)
    kv = tiny_models.flux().observe(reference, keep)[1].kept
    everything = {layer: kv[layer] for layer in LAYERS}
    kept = {layer: parts[:2] for layer, parts in everything.items()}
    keys = {layer: (k, None) for layer, (k, _) in kept.items()}
    queries = {layer: (None, None, q) for layer, (_, _, q) in everything.items()}
    free = replace(FreeTokens.of(torch.tensor([True, False, True, False])), kv=kv)
    of_context = {}
    if steered.context is not None:
        given = Inputs(**tiny_models.inputs(batch, seed=3, **SMALL), condition=steered)
        context = tiny_models.flux().observe(given, Intervention(keep_context=True))[1].context
        some = {layer: context[layer] for layer in LAYERS}
        of_context = {
            "context injected": Intervention(inject_context=some),
            "context not computed": Intervention(inject_context=context, hide_context=LAYERS),
        }
    return of_context | {
        "plain": Intervention(),
        "kept": Intervention(keep=LAYERS, watch=LAYERS),
        "skipped": Intervention(skip=tuple(frozenset((row,)) for row in range(batch))),
        "injected": Intervention(inject=kept),
        "injected in part": Intervention(inject=kept, inject_weights=dict.fromkeys(LAYERS, 0.5)),
        "context hidden": Intervention(hide_context=LAYERS),
        "keys injected": Intervention(inject=keys),
        "queries injected": Intervention(inject=queries),
        "queries injected in part": Intervention(inject=queries, inject_weights=dict.fromkeys(LAYERS, 0.5)),
        "all injected": Intervention(keep=LAYERS, keep_queries=LAYERS, watch=LAYERS, inject=everything),
        "some tokens free": Intervention(inject=kept, free=free),
        "some tokens free, kept": Intervention(keep=LAYERS, watch=LAYERS, free=free),
    }


@torch.no_grad()
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_says_the_same(hopper, batch, eight_bit):
    """With positions of each row its own: one table of rotations for all rows would be wrong. Measured 5.1e-7
    at most.
    """
    model, given = tiny_models.flux(), tiny_models.inputs(batch, **SMALL)
    given["img_ids"] = given["img_ids"] + torch.arange(batch)[:, None, None]
    fast = with_kernels(tiny_models.flux(), hopper)
    if eight_bit:
        to_fp8([model.double_blocks, model.single_blocks])
        to_fp8([fast.double_blocks, fast.single_blocks])
    steering = [Condition(), condition(batch), condition(batch, context_strength=1.5)]
    if eight_bit:
        # With more tokens, some value may lie so near the middle of two 8-bit floats that it is rounded the
        # other way.
        del steering[1:]
    calls = ((steered, *way) for steered in steering for way in ways(batch, steered).items())
    for steered, name, one in calls:
        inputs = Inputs(**given, condition=steered)
        expected, found = model.observe(inputs, one)
        answer, other = fast.observe(inputs, one)
        assert tiny_models.relative_error(answer, expected) < 1e-6, name
        for layer in found.kept:
            for x, y in zip(
                (*other.kept[layer], *other.watched[layer]), (*found.kept[layer], *found.watched[layer])
            ):
                assert tiny_models.relative_error(x, y) < 1e-6


@torch.no_grad()
def test_one_table_of_rotations_serves_all_rows(hopper):
    model = with_kernels(tiny_models.flux(), hopper)
    ids = torch.cat([tiny_models.inputs(1, **SMALL)[name] for name in ("txt_ids", "img_ids")], dim=1)
    pe, generator = model.pe_embedder(ids), torch.Generator().manual_seed(0)
    x, vec = (
        torch.randn(2, *n, tiny_models.PARAMS.hidden_size, generator=generator) for n in (pe.shape[2:3], ())
    )
    block = model.single_blocks[0]
    one, each = block(x, vec, pe), block(x, vec, pe.expand(2, -1, -1, -1, -1, -1))
    torch.testing.assert_close(one, each, rtol=0, atol=1e-6)


@torch.no_grad()
def test_streamed_blocks_take_their_weights_as_they_come(hopper):
    given = tiny_models.inputs(1, **SMALL)
    expected, model = tiny_models.flux()(**given), with_kernels(tiny_models.flux(), hopper)
    cpu, stacks = torch.device("cpu"), [model.double_blocks, model.single_blocks]
    with Offloaded(model, cpu, stacks, streamed=tiny_models.NUM_LAYERS).on_device():
        for _ in range(2):
            assert tiny_models.relative_error(model(**given), expected) < 1e-6


@torch.no_grad()
def test_other_weights_are_taken(hopper):
    """New ones in place of the old, which are then forgotten, and the same ones written over."""
    given, model = tiny_models.inputs(1, **SMALL), with_kernels(tiny_models.flux(), hopper)
    first = model(**given)
    for assign in (True, False):
        other = {name: x * 0.9 for name, x in model.state_dict().items()}
        model.load_state_dict(other, assign=assign)
        expected = tiny_models.flux()
        expected.load_state_dict(other)
        answer = model(**given)
        assert tiny_models.relative_error(answer, expected(**given)) < 1e-6
        assert tiny_models.relative_error(answer, first) > 1e-3
    weight = weakref.ref(model.single_blocks[0].linear2.weight)
    assert weight() is not None
    del model, expected
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize(
    ("product", "tokens", "inner", "channels", "best"),
    [
        ("GATED", 4608, 15360, 3072, (192, 192)),
        ("GELU", 4608, 3072, 12288, (128, 160)),
        ("HEADS", 4608, 3072, 6144, (192, 128)),
        ("GATED", 2304, 15360, 3072, (128, 144)),
        ("HEADS", 2304, 3072, 6144, (128, 128)),
        ("GATED", 512, 12288, 3072, (128, 96)),
        ("GATED", 256, 12288, 3072, (64, 96)),
    ],
)
def test_tiles_that_were_the_fastest(hopper, product, tokens, inner, channels, best):
    """On an H200, or as fast as the fastest within the noise of the measurement."""
    from flux.modules import matmul_hopper

    left, right = (torch.empty(1, n, inner, dtype=torch.bfloat16, device="meta") for n in (tokens, channels))
    tile = getattr(matmul_hopper, product).tile(left, right)
    assert (tile.tokens, tile.channels) == best


def test_what_can_be_with_kernels(hopper):
    """Plain layers in bfloat16 and those of 8-bit floats, heads that fit; modulations may be anything."""
    assert not hopper.serves(tiny_models.flux().bfloat16().double_blocks[0])
    block = tiny_models.flux(**WIDER).double_blocks[0]
    assert not hopper.serves(block)
    assert hopper.serves(block.bfloat16())
    to_fp8([block])
    assert hopper.serves(block)
    other = tiny_models.flux(**WIDER).bfloat16().double_blocks[0]
    lin = other.img_attn.proj
    other.img_attn.proj = LowRankLinear(
        lin, torch.zeros(2, lin.in_features), torch.zeros(lin.out_features, 2)
    )
    assert not hopper.serves(other)


def test_a_net_on_such_a_card_takes_them(hopper, monkeypatch):
    """A block that cannot is compiled as ever."""
    monkeypatch.setattr("flux.model.hopper_kernels", lambda device: hopper)
    model = tiny_models.flux(**WIDER).bfloat16()
    model.single_blocks[0].float()
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda block, **_: compiled.append(block))
    model.compile_blocks("cuda")
    assert compiled == [model.single_blocks[0]]
    assert type(model.single_blocks[0]) is SingleStreamBlock
    assert {type(block) for block in model.double_blocks} == {hopper.HopperDoubleBlock}
    assert {type(block) for block in model.single_blocks[1:]} == {hopper.HopperSingleBlock}


def test_without_a_kernel_nothing_is_with_kernels(hopper, monkeypatch):
    """With gradients for instance, or on the CPU."""
    monkeypatch.setattr(hopper, "has_kernel", lambda x: False)
    monkeypatch.setattr(hopper_stub.Epilogue, "run", lambda *_, **__: pytest.fail("no gradients there"))
    with_kernels(tiny_models.flux(), hopper)(**tiny_models.inputs(1, **SMALL))


@pytest.mark.parametrize(("capability", "there"), [((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_cards_that_have_them(hopper, monkeypatch, capability, there):
    monkeypatch.setattr("flux.model.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (hopper_kernels(torch.device("cuda")) is not None) is there
    assert hopper_kernels(torch.device("cpu")) is None


def test_without_the_packages(monkeypatch):
    """Not installed, nothing is said; installed and broken, one line is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("flux.model.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hopper_kernels(torch.device("cuda")) is None
    monkeypatch.setattr("flux.model.find_spec", lambda name: types.SimpleNamespace())
    hopper_stub.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "quack.epilogue.frontend")
    with pytest.warns(UserWarning, match="do not start .*torch compiles the blocks instead"):
        assert hopper_kernels(torch.device("cuda")) is None
    hopper_stub.forget()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("eight_bit", [False, True])
def test_on_a_card(eight_bit):
    """In bfloat16, as near to float32 as separate products; each row of a batch as it would be by itself."""
    cuda = torch.device("cuda")
    if hopper_kernels(cuda) is None:
        pytest.skip("needs a Hopper GPU, quack-kernels and flash-attn-4")
    given = {name: x.to(cuda) for name, x in tiny_models.inputs(2).items() if x is not None}
    narrow = {n: x.bfloat16() if x.is_floating_point() and "ids" not in n else x for n, x in given.items()}
    errors = []
    for way in ("plain", "hopper"):
        model = tiny_models.flux(hidden_size=256, num_heads=2, axes_dim=[16, 56, 56]).to(cuda)
        expected = model(**given)
        model.bfloat16()
        if eight_bit:
            to_fp8([model.double_blocks, model.single_blocks])
        if way == "hopper":
            model.compile_blocks(cuda)
            assert {type(block).__name__ for block in model.double_blocks} == {"HopperDoubleBlock"}
        answer = model(**narrow)
        errors.append(tiny_models.relative_error(answer.float(), expected))
        if way == "hopper":
            alone = model(**{name: x[1:] for name, x in narrow.items()})
            assert torch.equal(alone, answer[1:])
    assert errors[1] <= 1.2 * errors[0]
