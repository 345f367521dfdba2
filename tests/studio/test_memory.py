"""Models that make room for one another: which are loaded, which are freed, what a failed load leaves."""

import threading
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from helpers.studio import SMALL, finish, make_studio

from flux.errors import InputError
from flux.loaded_model import LoadedModel
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.studio import memory
from flux.studio.engine import Engine
from flux.studio.forms import generate_settings
from flux.studio.work.generate import run_generate


@pytest.fixture
def loads(monkeypatch, nano):
    """The models that are loaded, in order; each is the small one."""
    loads = []

    def load(settings, opened):
        loads.append(settings.model)
        return nano

    monkeypatch.setattr(LoadedModel, "load", load)
    return loads


@pytest.fixture
def studio(nano, tmp_path):
    """A studio of two models. The second one is not loaded."""
    studio = make_studio(nano, tmp_path)
    settings = resolve(ModelSettings(model="flux-nano-schnell", device="cpu", dtype="float32", **SMALL))
    studio.add(Engine(settings, memory=studio.engine.memory))
    return studio


def draw(studio):
    session = studio.sessions.of("a")
    return finish(run_generate(studio, session, generate_settings(studio, {"prompt": "a dog"})))


def test_a_model_is_loaded_by_its_first_run(studio, loads):
    other = studio.models["flux-nano-schnell"]
    assert not other.engine.is_loaded
    assert other.engine.reader.max_length == studio.engine.reader.max_length  # prompts are read before
    texts = [update.text for update in other.engine.run(lambda progress: None, threading.Event())]
    assert texts == ["loading flux-nano-schnell"]
    assert draw(other).settings.model == "flux-nano-schnell"
    assert draw(studio).settings.model == "flux-nano"
    assert loads == ["flux-nano-schnell"]  # both are small, and stay


def test_a_model_that_does_not_fit_beside_another_takes_its_place(studio, loads, monkeypatch):
    monkeypatch.setattr(memory, "fits_beside", lambda opened, settings: False)
    other = studio.models["flux-nano-schnell"]
    studio.engine.kept = object()
    draw(other)
    assert not studio.engine.is_loaded
    assert studio.engine.kept is None
    with pytest.raises(RuntimeError, match="flux-nano is not loaded"):
        _ = studio.engine.pipe
    draw(studio)
    assert loads == ["flux-nano-schnell", "flux-nano"]
    assert not other.engine.is_loaded


def test_a_model_that_cannot_be_loaded_leaves_the_others_at_work(studio, loads, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "fits_beside", lambda opened, settings: False)
    other = studio.models["flux-nano-schnell"]
    sound = other.engine.settings
    other.engine.settings = sound.model_copy(update={"weights": str(tmp_path / "gone.safetensors")})
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        draw(other)
    assert studio.engine.is_loaded  # the file was missed before anything was freed
    other.engine.settings = sound
    monkeypatch.setattr(LoadedModel, "load", lambda settings, opened: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(other)
    assert not other.engine.is_loaded
    assert not studio.engine.running
    monkeypatch.undo()
    assert draw(studio).images


def test_what_fits_beside(monkeypatch, nano):
    """A small model always; a large one where a GPU's free memory holds all of it."""
    from flux.specs import configs
    from flux.weights.find import find_model

    settings = resolve(ModelSettings(device="cpu"))
    opened = find_model(settings)
    assert memory.fits_beside(opened, settings)
    opened.spec = replace(configs["flux-nano"], folder=None)
    assert not memory.fits_beside(opened, settings)
    for free, offload, fits in ((2**34, "none", True), (2**34, "blocks", False), (2**20, "none", False)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.fits_beside(opened, settings.model_copy(update={"offload": offload})) == fits


def test_equal_weights_are_in_memory_once(nano):
    other = replace(nano, t5=deepcopy(nano.t5), ae=deepcopy(nano.ae), model=deepcopy(nano.model))
    other.model.img_in.bias.data += 1
    memory.share_weights(other, replace(nano, offloaded={nano.model: None}))
    assert not shared(other, nano)
    memory.share_weights(other, nano)
    assert shared(other, nano) == {*dict(nano.model.named_parameters())} - {"img_in.bias"}
    assert other.t5.hf_module.shared.weight.data_ptr() == nano.t5.hf_module.shared.weight.data_ptr()
    assert torch.equal(other.model.img_in.bias, nano.model.img_in.bias + 1)


def shared(one, other):
    """The names of the transformer's tensors that both hold in the same place."""
    places = {name: tensor.data_ptr() for name, tensor in other.model.named_parameters()}
    return {name for name, tensor in one.model.named_parameters() if tensor.data_ptr() == places[name]}
