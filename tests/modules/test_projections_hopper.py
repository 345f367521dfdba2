"""Products that do what follows them say what separate ones say: their arithmetic with stand-ins for the
packages, on a card with the real ones.
"""

import gc
import sys
import types
import warnings

import pytest
import torch
from helpers import hopper_stub, tiny_models

from flux.intervention import Intervention
from flux.model import with_epilogues
from flux.modules import layers
from flux.modules.projections import Apart
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import to_fp8
from flux.weights.lora import LowRankLinear

LAYERS = frozenset((1, 4))
SMALL = {"height": 32, "width": 32, "num_txt": 3}
WIDER = {"hidden_size": 64, "axes_dim": [8, 12, 12]}  # heads of a size that the kernels know


@pytest.fixture
def epilogues(monkeypatch):
    """The module, made with stand-ins; blocks take it on the CPU too."""
    hopper_stub.install(monkeypatch)
    monkeypatch.setattr(layers, "has_kernel", lambda x: True)
    from flux.modules import projections_hopper

    yield projections_hopper
    hopper_stub.forget()


def joined(model, epilogues):
    for block in (*model.double_blocks, *model.single_blocks):
        block.products = epilogues.Joined
    return model


def ways(batch: int) -> dict[str, Intervention]:
    """Every way a block is called: plainly, keeping and watching, taking wholly, in part, and keys alone."""
    kept = (
        tiny_models.flux()
        .observe(**tiny_models.inputs(1, seed=3, **SMALL), intervention=Intervention(keep=LAYERS))[1]
        .kept
    )
    keys = {layer: (k, None) for layer, (k, _) in kept.items()}
    return {
        "plain": Intervention(),
        "kept": Intervention(keep=LAYERS, watch=LAYERS),
        "skipped": Intervention(skip=tuple(frozenset((row,)) for row in range(batch))),
        "taken": Intervention(take=kept),
        "taken in part": Intervention(take=kept, weights=dict.fromkeys(LAYERS, 0.5)),
        "keys taken": Intervention(take=keys),
    }


@torch.no_grad()
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_says_the_same(epilogues, batch, eight_bit):
    """With positions of each row its own: one table of rotations for all rows would be wrong. Measured 3.8e-7
    at most.
    """
    model, given = tiny_models.flux(), tiny_models.inputs(batch, **SMALL)
    given["img_ids"] = given["img_ids"] + torch.arange(batch)[:, None, None]
    if eight_bit:
        to_fp8([model.double_blocks, model.single_blocks])
    for name, one in ways(batch).items():
        for block in (*model.double_blocks, *model.single_blocks):
            block.products = Apart
        expected, found = model.observe(**given, intervention=one)
        answer, other = joined(model, epilogues).observe(**given, intervention=one)
        assert tiny_models.relative_error(answer, expected) < 1e-6, name
        for layer in found.kept:
            for x, y in zip(
                (*other.kept[layer], *other.watched[layer]), (*found.kept[layer], *found.watched[layer])
            ):
                assert tiny_models.relative_error(x, y) < 1e-6


@torch.no_grad()
def test_one_table_of_rotations_serves_all_rows(epilogues):
    model = joined(tiny_models.flux(), epilogues)
    ids = torch.cat([tiny_models.inputs(1, **SMALL)[name] for name in ("txt_ids", "img_ids")], dim=1)
    pe, generator = model.pe_embedder(ids), torch.Generator().manual_seed(0)
    x, vec = (
        torch.randn(2, *n, tiny_models.PARAMS.hidden_size, generator=generator) for n in (pe.shape[2:3], ())
    )
    block = model.single_blocks[0]
    one, each = block(x, vec, pe), block(x, vec, pe.expand(2, -1, -1, -1, -1, -1))
    torch.testing.assert_close(one, each, rtol=0, atol=1e-6)


@torch.no_grad()
def test_streamed_blocks_take_their_weights_as_they_come(epilogues):
    given = tiny_models.inputs(1, **SMALL)
    expected, model = tiny_models.flux()(**given), joined(tiny_models.flux(), epilogues)
    cpu, stacks = torch.device("cpu"), [model.double_blocks, model.single_blocks]
    with Offloaded(model, cpu, stacks, streamed=tiny_models.NUM_LAYERS).at_work():
        for _ in range(2):
            assert tiny_models.relative_error(model(**given), expected) < 1e-6


@torch.no_grad()
def test_other_weights_are_taken(epilogues):
    """New ones in place of the old, which are then forgotten, and the same ones written over."""
    given, model = tiny_models.inputs(1, **SMALL), joined(tiny_models.flux(), epilogues)
    first = model(**given)
    for assign in (True, False):
        other = {name: x * 0.9 for name, x in model.state_dict().items()}
        model.load_state_dict(other, assign=assign)
        expected = tiny_models.flux()
        expected.load_state_dict(other)
        answer = model(**given)
        assert tiny_models.relative_error(answer, expected(**given)) < 1e-6
        assert tiny_models.relative_error(answer, first) > 1e-3
    known = len(epilogues._taken)
    del model, expected
    gc.collect()
    assert known
    assert not epilogues._taken


@pytest.mark.parametrize(
    ("product", "tokens", "inner", "channels", "best"),
    [
        ("GATED", 4608, 15360, 3072, (192, 192)),
        ("GELU", 4608, 3072, 12288, (128, 160)),
        ("TURNED", 4608, 3072, 6144, (192, 128)),
        ("GATED", 2304, 15360, 3072, (128, 144)),
        ("TURNED", 2304, 3072, 6144, (128, 128)),
        ("GATED", 512, 12288, 3072, (128, 96)),
        ("GATED", 256, 12288, 3072, (64, 96)),
    ],
)
def test_tiles_that_were_the_fastest(epilogues, product, tokens, inner, channels, best):
    """Of all, on an H200, or as fast as the fastest within what differs from one time to the next."""
    left, right = (torch.empty(1, n, inner, dtype=torch.bfloat16, device="meta") for n in (tokens, channels))
    tile = epilogues._tile(getattr(epilogues, product), left, right)
    assert (tile.tokens, tile.channels) == best


def test_what_can_be_joined(epilogues):
    """Plain layers in bfloat16 and those of 8-bit floats, heads that fit; modulations may be anything."""
    assert not epilogues.serves(tiny_models.flux().bfloat16().double_blocks[0])
    block = tiny_models.flux(**WIDER).double_blocks[0]
    assert not epilogues.serves(block)
    assert epilogues.serves(block.bfloat16())
    to_fp8([block])
    assert epilogues.serves(block)
    other = tiny_models.flux(**WIDER).bfloat16().double_blocks[0]
    lin = other.img_attn.proj
    other.img_attn.proj = LowRankLinear(
        lin, torch.zeros(2, lin.in_features), torch.zeros(lin.out_features, 2)
    )
    assert not epilogues.serves(other)


def test_a_net_on_such_a_card_takes_them(epilogues, monkeypatch):
    """A block that cannot is compiled as ever."""
    monkeypatch.setattr("flux.model.with_epilogues", lambda device: epilogues)
    model = tiny_models.flux(**WIDER).bfloat16()
    model.single_blocks[0].float()
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **_: compiled.append(block))
    model.compile_blocks("cuda")
    assert compiled == [model.single_blocks[0]]
    assert model.single_blocks[0].products is Apart
    rest = {block.products for block in (*model.double_blocks, *model.single_blocks[1:])}
    assert rest == {epilogues.Joined}


def test_without_a_kernel_nothing_is_joined(epilogues, monkeypatch):
    """With gradients for instance, or on the CPU."""
    monkeypatch.setattr(layers, "has_kernel", lambda x: False)
    monkeypatch.setattr(hopper_stub.Epilogue, "run", lambda *_, **__: pytest.fail("no gradients there"))
    joined(tiny_models.flux(), epilogues)(**tiny_models.inputs(1, **SMALL))


@pytest.mark.parametrize(("capability", "there"), [((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_cards_that_have_them(epilogues, monkeypatch, capability, there):
    monkeypatch.setattr("flux.model.find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (with_epilogues(torch.device("cuda")) is not None) is there
    assert with_epilogues(torch.device("cpu")) is None


def test_without_the_packages(monkeypatch):
    """Not installed, nothing is said; installed and broken, one line is."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("flux.model.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_epilogues(torch.device("cuda")) is None
    monkeypatch.setattr("flux.model.find_spec", lambda name: types.SimpleNamespace())
    hopper_stub.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "quack.epilogue.frontend")
    with pytest.warns(UserWarning, match="do not start .*torch compiles the blocks instead"):
        assert with_epilogues(torch.device("cuda")) is None
    hopper_stub.forget()


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("eight_bit", [False, True])
def test_on_a_card(eight_bit):
    """In bfloat16, as near to float32 as separate products; each row of a batch as it would be by itself."""
    cuda = torch.device("cuda")
    if with_epilogues(cuda) is None:
        pytest.skip("needs a Hopper card, quack-kernels and flash-attn-4")
    given = {name: x.to(cuda) for name, x in tiny_models.inputs(2).items() if x is not None}
    narrow = {n: x.bfloat16() if x.is_floating_point() and "ids" not in n else x for n, x in given.items()}
    errors = []
    for way in ("apart", "joined"):
        model = tiny_models.flux(hidden_size=256, num_heads=2, axes_dim=[16, 56, 56]).to(cuda)
        expected = model(**given)
        model.bfloat16()
        if eight_bit:
            to_fp8([model.double_blocks, model.single_blocks])
        if way == "joined":
            model.compile_blocks(cuda)
            assert {block.products.__name__ for block in model.double_blocks} == {"Joined"}
        answer = model(**narrow)
        errors.append(tiny_models.relative_error(answer.float(), expected))
        if way == "joined":
            alone = model(**{name: x[1:] for name, x in narrow.items()})
            assert torch.equal(alone, answer[1:])
    assert errors[1] <= 1.2 * errors[0]
