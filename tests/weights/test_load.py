"""Loading: strict about names and shapes, and one tensor at a time."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import save_file

from flux.errors import InputError
from flux.specs import NANO_FOLDER, configs
from flux.util import load_ae, load_clip, load_flow_model, load_t5
from flux.weights.headers import StoredTensor
from flux.weights.open_model import ModelFiles, OpenModel


@pytest.fixture(scope="module")
def schnell():
    return tiny_models.flux(guidance_embed=False).state_dict()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_each_width(load, weights, stored):
    model = load({name: x.to(stored) for name, x in weights.items()})
    for name, x in model.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, weights[name].to(stored).float())


def test_a_loaded_model_answers_as_the_saved_one(load, weights):
    given = tiny_models.inputs(2)
    model = load(weights)
    assert torch.equal(model(**given), tiny_models.flux()(**given))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_in_bfloat16(load, weights):
    assert {x.dtype for x in load(weights, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}


def test_an_autoencoder(small, tmp_path, monkeypatch):
    own = tiny_models.autoencoder()
    save_file(own.state_dict(), tmp_path / "ae.safetensors")
    monkeypatch.setenv("AE", str(tmp_path / "ae.safetensors"))
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_ae("flux-dev", "cpu")(image), own(image))


def test_missing_tensors_are_named(load, weights):
    weights = {name: x for name, x in weights.items() if "double_blocks.1.img_mlp" not in name}
    with pytest.raises(InputError, match=r"missing double_blocks\.1\.img_mlp\.0\.bias, .* and 1 more"):
        load(weights)


def test_unexpected_tensors_are_named(load, weights):
    with pytest.raises(InputError, match=r"unexpected lora_down.weight") as error:
        load({**weights, "lora_down.weight": torch.zeros(1)})
    assert "flux-" not in str(error.value), "this is no file of another model"


def test_mis_shaped_tensors_are_named(load, weights):
    with pytest.raises(InputError, match=r"img_in\.weight \(32, 128\) instead of \(32, 64\)"):
        load({**weights, "img_in.weight": torch.zeros(32, 128)})


def test_a_dev_file_as_schnell(load, weights):
    with pytest.raises(InputError, match=r"it is a dev file .* load it as flux-dev"):
        load(weights, "flux-schnell")


def test_a_schnell_file_as_dev(load, schnell):
    match = r"it has no guidance_in: .* load it as flux-schnell; .* load it as flux-dev-de-distilled$"
    with pytest.raises(InputError, match=match):
        load(schnell, "flux-dev")


def test_messages_are_one_line(load, weights):
    with pytest.raises(InputError) as error:
        load({"nothing": torch.zeros(1)})
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    assert "weights.safetensors" in message


def test_nothing_is_mapped(small, tmp_path, monkeypatch, weights):
    """On network and FUSE file systems mapping fails with OSError 19; plain reads do not."""
    import mmap

    import safetensors
    import transformers.modeling_utils  # noqa: F401  # it keeps the functions that it finds when it is imported

    def refuse(*_, **__):
        raise OSError(19, "No such device")

    save_file(weights, tmp_path / "m.safetensors")
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    monkeypatch.setenv("FLUX_MODEL", str(tmp_path / "m.safetensors"))
    load_flow_model("flux-dev", "cpu", verbose=False)
    load_ae("flux-nano", "cpu")
    load_t5("cpu", folder=NANO_FOLDER)
    load_clip("cpu", folder=NANO_FOLDER)


def test_host_memory_holds_one_tensor_at_a_time(tmp_path, monkeypatch, weights):
    """Whatever is read is handed on before the next one is."""
    import weakref

    path = tmp_path / "m.safetensors"
    save_file(weights, path)
    read, alive, most = StoredTensor.read, set(), 0

    def watched(self, device="cpu", is_filled=False):
        nonlocal most
        raw = read(self, device, is_filled)
        alive.add(id(raw))
        weakref.finalize(raw, alive.discard, id(raw))
        most = max(most, len(alive))
        return raw

    monkeypatch.setattr(StoredTensor, "read", watched)
    spec = replace(configs["flux-dev"], params=tiny_models.PARAMS)
    OpenModel(spec, ModelFiles(path, path, path)).load_transformer("cpu", torch.bfloat16)
    assert most <= 2
