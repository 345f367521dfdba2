"""Nets in host memory compute what they compute on the device, under every intervention."""

import pytest
import torch
from helpers import tiny_models
from PIL import Image

from flux.editing.edit import edit
from flux.intervention import Intervention
from flux.pipeline import Pipeline
from flux.runtime.offload import Feed, Offloaded, Streamed, evenly_spaced
from flux.settings.complete import resolve
from flux.settings.demos import EditSettings

CPU = torch.device("cpu")
GIVEN = tiny_models.inputs(2)


def offloaded(streamed: int, device: torch.device = CPU) -> Offloaded:
    model = tiny_models.flux()
    return Offloaded(model, device, [model.double_blocks, model.single_blocks], streamed)


def hands_over() -> dict:
    """Keys and values of another picture, in a double- and a single-stream layer."""
    kept = (
        tiny_models.flux()
        .observe(**tiny_models.inputs(1, seed=3), intervention=Intervention(keep=frozenset((1, 4))))[1]
        .kept
    )
    return {layer: (k, v) for layer, (k, v) in kept.items()}


INTERVENTIONS = {
    "nothing": lambda: Intervention(),
    "bypass": lambda: Intervention(skip=frozenset((0, 3, 6))),
    "bypass in one row": lambda: Intervention(skip=(frozenset((2,)), frozenset())),
    "injection": lambda: Intervention(take=hands_over()),
    "keeping": lambda: Intervention(keep=frozenset((0, 5))),
}


@pytest.mark.parametrize("streamed", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("what", INTERVENTIONS)
def test_the_same_velocity_to_the_last_bit(what, streamed):
    net, intervention = offloaded(streamed), INTERVENTIONS[what]()
    expected, found = tiny_models.flux().observe(**GIVEN, intervention=intervention)
    for _ in range(2):
        with net.at_work():
            velocity, seen = net.net.observe(**GIVEN, intervention=intervention)
        assert torch.equal(velocity, expected)
        assert seen.kept.keys() == found.kept.keys()
        assert all(torch.equal(seen.kept[layer][0], k) for layer, (k, _) in found.kept.items())


def test_a_pass_that_begins_late():
    """As a scan's first step, which begins where the first bypassed layer is."""
    net, plain = offloaded(7), tiny_models.flux()
    start = plain.streams(**GIVEN)[5]
    with net.at_work():
        assert torch.equal(net.net.observe(**GIVEN, start=start)[0], plain.observe(**GIVEN, start=start)[0])


def test_afterwards_all_weights_are_home():
    net, plain = offloaded(4), tiny_models.flux().state_dict()
    with net.at_work():
        net.net(**GIVEN)
    assert net.feed.rooms == []
    for name, x in net.net.state_dict().items():
        assert torch.equal(x, plain[name.replace(".block.", ".")]), name


def test_an_error_while_at_work_leaves_them_home_too():
    net = offloaded(4)
    with pytest.raises(RuntimeError, match="stopped"), net.at_work():
        net.net(**GIVEN)
        raise RuntimeError("stopped")
    assert net.feed.rooms == []
    with net.at_work():
        assert torch.equal(net.net(**GIVEN), tiny_models.flux()(**GIVEN))


def test_two_blocks_at_most_are_on_the_device(monkeypatch):
    """Each is sent once a pass, just before the one it follows computes."""
    net, sent = offloaded(7), []
    send = Feed._send
    monkeypatch.setattr(
        Feed, "_send", lambda feed, number, room: (sent.append(number), send(feed, number, room))
    )
    with net.at_work():
        assert [room.nbytes for room in net.feed.rooms] == [max(b.nbytes for b in net.feed.blocks)] * 2
        for _ in range(2):
            net.net(**GIVEN)
    assert sent == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]


def test_which_blocks_are_streamed():
    assert evenly_spaced(7, 7) == list(range(7))
    assert evenly_spaced(0, 7) == []
    assert evenly_spaced(3, 9) == [0, 3, 6]
    model = offloaded(2).net
    streamed = [isinstance(block, Streamed) for block in (*model.double_blocks, *model.single_blocks)]
    assert streamed == [True, False, False, True, False, False, False]


def test_tied_tensors_stay_tied():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    shelf = Offloaded(net, CPU)
    with shelf.at_work():
        assert net["a"].weight is net["b"].weight


def test_compiled_blocks_are_streamed():
    """The compiled function is the block's; which memory its weights lie in is no part of it."""
    model = tiny_models.flux()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend="eager", fullgraph=True)
    net = Offloaded(model, CPU, [model.double_blocks, model.single_blocks], 7)
    with net.at_work(), torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(model(**GIVEN), tiny_models.flux()(**GIVEN))


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_a_photograph_is_edited_as_without(nano, offload):
    """Encoded, inverted, injected into and decoded: each net comes and goes several times."""
    settings = EditSettings(
        device="cpu", dtype="float32", offload=offload, prompt="a dog", edits=["a cat", "a red dog"],
        width=64, height=64, num_steps=2, batch_size=2, vital_layers=[1, 4, 9],
    )  # fmt: skip
    photo = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    pictures = []
    for pipe in (nano, Pipeline.load(resolve(settings))):
        edits = edit(pipe, resolve(settings), settings.vital_layers, photo=photo, progress=False)
        pictures.append([image.tobytes() for image in (edits.reference, *edits.edits)])
    assert pictures[0] == pictures[1]


@pytest.mark.gpu
def test_streams_do_not_overtake_each_other():
    """Blocks arrive before they compute, and not while what was in their room still does."""
    cuda = torch.device("cuda")
    given = {name: None if x is None else x.to(cuda) for name, x in GIVEN.items()}
    expected = tiny_models.flux().to(cuda)(**given)
    for streamed in (3, 7):
        net = offloaded(streamed, cuda)
        assert net.feed.blocks[0].host.is_pinned()
        with net.at_work():
            for _ in range(20):
                assert torch.equal(net.net(**given), expected)
