"""Offloaded models compute the same as models on the device, under every intervention."""

import pytest
import torch
from helpers import tiny_models
from PIL import Image

from flux.editing.edit import edit
from flux.inputs import Condition
from flux.intervention import Intervention
from flux.loaded_model import LoadedModel
from flux.model import Inputs
from flux.runtime.offload import BlockStreamer, Offloaded, StreamedBlock, evenly_spaced
from flux.sampling import Conditioning, sample
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings

CPU = torch.device("cpu")
GIVEN = tiny_models.inputs(2)


def offload(streamed: int, device: torch.device = CPU) -> Offloaded:
    model = tiny_models.flux()
    return Offloaded(model, device, [model.double_blocks, model.single_blocks], streamed)


def kv_of_another_image() -> dict:
    """The kv of another image, in a double- and a single-stream layer."""
    kept = (
        tiny_models.flux()
        .observe(Inputs(**tiny_models.inputs(1, seed=3)), intervention=Intervention(keep=frozenset((1, 4))))[
            1
        ]
        .kept
    )
    return {layer: (k, v) for layer, (k, v) in kept.items()}


INTERVENTIONS = {
    "nothing": lambda: Intervention(),
    "skip": lambda: Intervention(skip=frozenset((0, 3, 6))),
    "skip in one row": lambda: Intervention(skip=(frozenset((2,)), frozenset())),
    "injection": lambda: Intervention(inject=kv_of_another_image()),
    "keeping": lambda: Intervention(keep=frozenset((0, 5))),
}


@pytest.mark.parametrize("streamed", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("what", INTERVENTIONS)
def test_the_same_velocity_to_the_last_bit(what, streamed):
    offloaded, intervention = offload(streamed), INTERVENTIONS[what]()
    expected, found = tiny_models.flux().observe(Inputs(**GIVEN), intervention=intervention)
    for _ in range(2):
        with offloaded.on_device():
            velocity, seen = offloaded.module.observe(Inputs(**GIVEN), intervention=intervention)
        assert torch.equal(velocity, expected)
        assert seen.kept.keys() == found.kept.keys()
        assert all(torch.equal(seen.kept[layer][0], k) for layer, (k, _) in found.kept.items())


def test_a_pass_that_begins_late():
    """A scan's first step begins at the first skipped layer."""
    offloaded, plain = offload(7), tiny_models.flux()
    start = plain.streams(Inputs(**GIVEN))[5]
    with offloaded.on_device():
        assert torch.equal(
            offloaded.module.observe(Inputs(**GIVEN), start=start)[0],
            plain.observe(Inputs(**GIVEN), start=start)[0],
        )


def test_afterwards_all_weights_are_in_host_memory():
    offloaded, plain = offload(4), tiny_models.flux().state_dict()
    with offloaded.on_device():
        offloaded.module(**GIVEN)
    assert offloaded.streamer.buffers == []
    for name, x in offloaded.module.state_dict().items():
        assert torch.equal(x, plain[name.replace(".block.", ".")]), name


def test_after_an_error_they_are_in_host_memory_too():
    offloaded = offload(4)

    def compute_and_stop() -> None:
        with offloaded.on_device():
            offloaded.module(**GIVEN)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        compute_and_stop()
    assert offloaded.streamer.buffers == []
    with offloaded.on_device():
        assert torch.equal(offloaded.module(**GIVEN), tiny_models.flux()(**GIVEN))


def test_two_blocks_at_most_are_on_the_device(monkeypatch):
    """Each is copied once per pass, while the one before it computes."""
    offloaded, sent = offload(7), []
    copy = BlockStreamer.copy

    def recorded(streamer: BlockStreamer, number: int, buffer: int) -> None:
        sent.append(number)
        copy(streamer, number, buffer)

    monkeypatch.setattr(BlockStreamer, "copy", recorded)
    with offloaded.on_device():
        largest = max(block.nbytes for block in offloaded.streamer.blocks)
        assert [buffer.nbytes for buffer in offloaded.streamer.buffers] == [largest, largest]
        for _ in range(2):
            offloaded.module(**GIVEN)
    assert sent == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]


def test_backward_passes_find_the_block_before_on_the_device(monkeypatch):
    """Then each block is copied once per pass in reverse order, too, but for those where the order turns."""
    sent, copy = [], BlockStreamer.copy

    def recorded(streamer: BlockStreamer, number: int, buffer: int) -> None:
        sent.append(number)
        copy(streamer, number, buffer)

    monkeypatch.setattr(BlockStreamer, "copy", recorded)
    blocks = [torch.nn.Linear(3, 3) for _ in range(6)]
    weights = [block.weight.clone() for block in blocks]
    streamer = BlockStreamer(blocks, CPU)
    streamer.open()
    for number in (*range(6), *reversed(range(6)), *range(6)):
        streamer.ensure_on_device(number)
        assert torch.equal(blocks[number].weight, weights[number])
    assert sent == [*range(6), 0, 4, 3, 2, 1, 0, 5, 1, 2, 3, 4, 5, 0]


def test_which_blocks_are_streamed():
    assert evenly_spaced(7, 7) == list(range(7))
    assert evenly_spaced(0, 7) == []
    assert evenly_spaced(3, 9) == [0, 3, 6]
    model = offload(2).module
    streamed = [isinstance(block, StreamedBlock) for block in (*model.double_blocks, *model.single_blocks)]
    assert streamed == [True, False, False, True, False, False, False]


def test_tied_tensors_stay_tied():
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    offloaded = Offloaded(module, CPU)
    with offloaded.on_device():
        assert module["a"].weight is module["b"].weight


def test_compiled_blocks_are_streamed():
    """The compiled function belongs to the block and does not depend on where its weights are."""
    model = tiny_models.flux()
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend="eager", fullgraph=True)
    offloaded = Offloaded(model, CPU, [model.double_blocks, model.single_blocks], 7)
    with offloaded.on_device(), torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(model(**GIVEN), tiny_models.flux()(**GIVEN))


def test_compiled_and_streamed_blocks_attend_to_a_kept_context():
    """One graph for each kind of step: a break would be an error. Streamed or not, the same bits."""
    generator = torch.Generator().manual_seed(0)
    context = {"context": torch.randn(1, 12, 64, generator=generator), "context_ids": torch.ones(1, 12, 3)}
    cond = Conditioning(*(GIVEN[name] for name in ("txt", "txt_ids", "y", "guidance")))
    cond = cond.with_condition(Condition(**context), context_every=2)
    start = GIVEN["img"], GIVEN["img_ids"], cond, [1.0, 0.7, 0.4, 0.0]
    model = tiny_models.flux(depth=1, depth_single_blocks=1)
    *_, plain = sample(model, *start)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    offloaded = Offloaded(model, CPU, [model.double_blocks, model.single_blocks], 2)
    with offloaded.on_device(), torch._dynamo.config.patch(error_on_recompile=False):
        *_, made = sample(model, *start)
    assert torch.equal(made.latent, plain.latent)


@pytest.mark.parametrize("offload", ["model", "blocks"])
def test_a_photo_is_edited_as_without_offloading(nano, offload):
    """Encoded, inverted, injected into and decoded: each model is copied several times."""
    settings = EditSettings(
        device="cpu", dtype="float32", offload=offload, prompt="a dog", edits=["a cat", "a red dog"],
        width=64, height=64, num_steps=2, batch_size=2, vital_layers=[1, 4, 9],
    )  # fmt: skip
    photo = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    images = []
    for pipe in (nano, LoadedModel.load(resolve(settings))):
        edits = edit(pipe, resolve(settings), settings.vital_layers, photo=photo, progress=False)
        images.append([image.tobytes() for image in (edits.reference, *edits.edits)])
    assert images[0] == images[1]


@pytest.mark.gpu
def test_streams_do_not_overtake_each_other():
    """A block arrives before it computes, and only after the one in its buffer has computed."""
    cuda = torch.device("cuda")
    given = {name: None if x is None else x.to(cuda) for name, x in GIVEN.items()}
    expected = tiny_models.flux().to(cuda)(**given)
    for streamed in (3, 7):
        offloaded = offload(streamed, cuda)
        assert offloaded.streamer.blocks[0].host.is_pinned()
        with offloaded.on_device():
            for _ in range(20):
                assert torch.equal(offloaded.module(**given), expected)
