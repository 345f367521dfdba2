"""Reading weights: strict about names and shapes, and one readable line for whatever else may lie at a
path.
"""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import save_file

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.util import load_ae, load_clip, load_flow_model, load_t5
from flux.weights import find
from flux.weights.checkpoint import open_checkpoint
from flux.weights.find import find_model
from flux.weights.headers import StoredTensor
from flux.weights.hub import TEXT_FOLDERS
from flux.weights.load import read_weights
from flux.weights.open_model import ModelFiles, OpenModel


@pytest.fixture
def small(monkeypatch):
    """The published models with the toy's sizes and the small model's text encoders, so that their files fit
    a test.
    """
    for name in ("flux-dev", "flux-schnell"):
        spec = configs[name]
        params = replace(tiny_models.PARAMS, guidance_embed=spec.params.guidance_embed)
        monkeypatch.setitem(configs, name, replace(spec, params=params, ae_params=tiny_models.AE_PARAMS))


@pytest.fixture(scope="module")
def dev():
    return tiny_models.flux().state_dict()


@pytest.fixture(scope="module")
def schnell():
    return tiny_models.flux(guidance_embed=False).state_dict()


@pytest.fixture
def load(small, tmp_path, monkeypatch):
    """Saves weights to a file, and loads them as flux-dev or another model."""

    def save_and_load(weights, name="flux-dev", dtype=torch.float32):
        path = tmp_path / "weights.safetensors"
        save_file({key: x.contiguous() for key, x in weights.items()}, path)
        monkeypatch.setenv("FLUX_MODEL", str(path))
        return load_flow_model(name, "cpu", verbose=False, dtype=dtype)

    return save_and_load


# ---- right files


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_files_of_each_width(load, dev, stored):
    model = load({name: x.to(stored) for name, x in dev.items()})
    for name, x in model.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, dev[name].to(stored).float())


def test_a_loaded_model_answers_as_the_saved_one(load, dev):
    given = tiny_models.inputs(2)
    model = load(dev)
    assert torch.equal(model(**given), tiny_models.flux()(**given))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_in_bfloat16(load, dev):
    assert {x.dtype for x in load(dev, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_8_bit_floats(load, dev, kind):
    """Files with everything cast and no scales: the cast is undone, nothing else."""
    model = load({name: x.to(kind) for name, x in dev.items()})
    for name, x in model.state_dict().items():
        assert torch.equal(x, dev[name].to(kind).float())


@pytest.mark.parametrize("marker", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scaled_8_bit_floats(load, dev, shape, marker):
    """Matrices times the scale that stands beside them, multiplied before they are rounded to the model's
    dtype; without it the model would load and make noise. Scales of activations and the marker are of no use
    here.
    """
    weights, expected = {"scaled_fp8": torch.empty(marker, dtype=torch.float8_e4m3fn)}, {}
    for name, x in dev.items():
        weights[name], expected[name] = x, x
        if name.endswith(".weight"):
            scale = x.abs().max() / 448
            weights[name] = (x / scale).to(torch.float8_e4m3fn)
            weights[name.replace(".weight", ".scale_weight")] = scale.reshape(shape)
            weights[name.replace(".weight", ".scale_input")] = torch.ones(shape)
            expected[name] = weights[name].float() * scale
    model = load(weights)
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected[name]), name
    for name, x in load(weights, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(x, expected[name].bfloat16()), name


def test_the_small_models_own_file_reads_as_its_scales_say(nano):
    from safetensors.torch import load_file

    plain = tiny_models.unscaled(load_file(NANO_FOLDER / "transformer.safetensors"))
    for name, x in nano.model.state_dict().items():
        assert torch.equal(x, plain[name]), name


def test_an_autoencoder(small, tmp_path, monkeypatch):
    own = tiny_models.autoencoder()
    save_file(own.state_dict(), tmp_path / "ae.safetensors")
    monkeypatch.setenv("AE", str(tmp_path / "ae.safetensors"))
    picture = torch.rand(1, 3, 32, 32)
    assert torch.equal(load_ae("flux-dev", "cpu")(picture), own(picture))


def test_text_encoders_from_a_folder():
    t5, clip = load_t5("cpu", 16, folder=NANO_FOLDER), load_clip("cpu", folder=NANO_FOLDER)
    assert t5(["a dog"]).shape == (1, 16, 256)
    assert t5(["a dog"]).dtype == torch.bfloat16
    assert clip.is_clip
    assert clip.max_length == 77
    assert load_t5("cpu", name="flux-schnell", folder=NANO_FOLDER).max_length == 256


# ---- strictness


def test_missing_tensors_are_named(load, dev):
    weights = {name: x for name, x in dev.items() if "double_blocks.1.img_mlp" not in name}
    with pytest.raises(InputError, match=r"missing double_blocks\.1\.img_mlp\.0\.bias, .* and 1 more"):
        load(weights)


def test_unexpected_tensors_are_named(load, dev):
    with pytest.raises(InputError, match="unexpected lora_down.weight") as error:
        load({**dev, "lora_down.weight": torch.zeros(1)})
    assert "flux-" not in str(error.value), "this is no file of another model"


def test_mis_shaped_tensors_are_named(load, dev):
    with pytest.raises(InputError, match=r"img_in\.weight \(32, 128\) instead of \(32, 64\)"):
        load({**dev, "img_in.weight": torch.zeros(32, 128)})


@pytest.mark.parametrize("leftover", ["img_in.weight_scale", "img_in.comfy_quant"])
def test_scales_of_other_forms_are_refused(load, dev, leftover):
    """Loaded as plain weights such a file makes noise without any error."""
    with pytest.raises(InputError, match=leftover):
        load({**dev, leftover: torch.ones(1)})


def test_a_dev_file_as_schnell(load, dev):
    with pytest.raises(InputError, match="it is a dev file .* load it as flux-dev"):
        load(dev, "flux-schnell")


def test_a_schnell_file_as_dev(load, schnell):
    with pytest.raises(InputError, match="it is a schnell file .* load it as flux-schnell"):
        load(schnell, "flux-dev")


def test_messages_are_one_line(load, dev):
    with pytest.raises(InputError) as error:
        load({"nothing": torch.zeros(1)})
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 500
    assert "weights.safetensors" in message


# ---- what else may lie at a path


def header(data: dict) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text


WHOLE = header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 23802932552\n"
CONTENTS = {
    "an LFS pointer": (LFS, "Git-LFS pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>" * 20, "web page"),
    "a torch file": (b"PK\x03\x04" + bytes(64), "pickle"),
    "a bare pickle": (b"\x80\x02}q\x00." + bytes(64), "pickle"),
    "an empty file": (b"", "cut short"),
    "a few bytes": (WHOLE[:5], "cut short"),
    "only zeros": (bytes(1000), "full of zeros.*cut short"),
    "cut in the header": (WHOLE[:30], "header.*cut short"),
    "cut in the data": (WHOLE[:-3], f"{len(WHOLE) - 3} bytes, expected {len(WHOLE)}"),
    "bytes too many": (WHOLE + b"x", f"{len(WHOLE) + 1} bytes, expected {len(WHOLE)}"),
    "a header of another kind": (header({"a": 1}), "header is broken"),
    "offsets that are no numbers": (
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}),
        "header",
    ),
    "a kind of number nobody knows": (
        header({"a": {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16),
        "header|F3",
    ),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_files_that_are_no_weights(tmp_path, what):
    content, expected = CONTENTS[what]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read_weights(path, "cpu", torch.float32)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_file_passes(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(WHOLE)
    assert read_weights(tmp_path / "weights.safetensors", "cpu", torch.bfloat16)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("length", [ord("<"), 0x80])
def test_a_header_whose_length_looks_like_another_format(tmp_path, length):
    """The first byte of a good file may be that of a web page or a pickle."""
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(4))
    assert read_weights(tmp_path / "weights.safetensors", "cpu", torch.float32)["a"].tolist() == [0]


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        open_checkpoint(tmp_path)


# ---- where files come from


def files_of(model: str, **paths: str) -> ModelFiles:
    return find_model(ModelSettings(model=model, **paths)).files


def test_each_way_to_name_a_file(small, tmp_path, monkeypatch):
    """An argument wins over the model's own variable, which wins over the one for all models."""
    flows = {name: tmp_path / f"{name}.safetensors" for name in ("argument", "own", "general")}
    aes = {name: tmp_path / f"{name}_ae.safetensors" for name in flows}
    for name in flows:
        save_file({"img_in.weight": torch.zeros(1)}, flows[name])
        save_file({"decoder.mid.attn_1.q.weight": torch.zeros(1)}, aes[name])
    ae, text = str(aes["own"]), str(NANO_FOLDER)
    monkeypatch.setenv("FLUX_MODEL", str(flows["general"]))
    assert files_of("flux-dev", ae_weights=ae, text_encoders=text).flow == flows["general"]
    monkeypatch.setenv("FLUX_DEV", str(flows["own"]))
    assert files_of("flux-dev", ae_weights=ae, text_encoders=text).flow == flows["own"]
    assert files_of("flux-schnell", ae_weights=ae, text_encoders=text).flow == flows["general"]
    assert (
        files_of("flux-dev", weights=str(flows["argument"]), ae_weights=ae, text_encoders=text).flow
        == flows["argument"]
    )
    monkeypatch.setenv("AE", str(aes["general"]))
    assert files_of("flux-dev", text_encoders=text).ae == aes["general"]
    monkeypatch.setenv("FLUX_AE", str(aes["own"]))
    assert files_of("flux-dev", text_encoders=text).ae == aes["own"]
    assert files_of("flux-dev", text_encoders=text).text == NANO_FOLDER


@pytest.mark.parametrize("variable", ["FLUX_MODEL", "FLUX_DEV", "FLUX_AE", "AE", "FLUX_SCHNELL"])
def test_flux_nano_ignores_the_variables(monkeypatch, variable):
    monkeypatch.setenv(variable, "/nowhere.safetensors")
    files = files_of("flux-nano")
    assert (files.flow.parent, files.ae.parent, files.text) == (NANO_FOLDER,) * 3


@pytest.mark.parametrize("variable", ["FLUX_DEV", "FLUX_MODEL", "AE", "FLUX_AE"])
def test_a_wrong_path_is_told_before_anything_is_downloaded(monkeypatch, variable):
    monkeypatch.setattr(find, "own_file", lambda *_: pytest.fail("went to the hub"))
    monkeypatch.setattr(find, "own_text_folder", lambda *_: pytest.fail("went to the hub"))
    monkeypatch.setenv(variable, "/nowhere.safetensors")
    with pytest.raises(InputError, match="/nowhere.safetensors, which does not exist"):
        files_of("flux-dev")


def test_a_text_folder_that_lacks_something(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="no folder text_encoder_2 or tokenizer_2"):
        files_of("flux-nano", text_encoders=str(tmp_path))


@pytest.fixture
def text_folder(tmp_path):
    """The small model's text encoders in a folder of one's own, to be damaged."""
    import shutil

    for name in TEXT_FOLDERS:
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    return tmp_path


def load_texts(folder: Path) -> None:
    files = files_of("flux-nano", text_encoders=str(folder))
    load_t5("cpu", folder=files.text)
    load_clip("cpu", folder=files.text)


def test_a_text_encoder_that_is_an_lfs_pointer(text_folder):
    """What a clone of FLUX.1's repository without Git-LFS leaves."""
    (text_folder / "text_encoder_2" / "model.safetensors").write_bytes(LFS)
    with pytest.raises(InputError, match="git lfs pull"):
        load_texts(text_folder)


def test_a_text_encoder_cut_short(text_folder):
    path = text_folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="bytes, expected"):
        load_texts(text_folder)


def test_a_text_encoder_without_weights(text_folder):
    (text_folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError):
        load_texts(text_folder)


def test_a_text_encoder_that_lacks_a_tensor(text_folder):
    """transformers would draw it at random and go on with a warning."""
    from safetensors.torch import load_file

    path = text_folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"):
        load_texts(text_folder)


# ---- file systems that refuse to map


def test_nothing_is_mapped(small, tmp_path, monkeypatch, dev):
    """On network and FUSE file systems mapping fails with OSError 19; plain reads do not."""
    import mmap

    import safetensors

    def refuse(*_, **__):
        raise OSError(19, "No such device")

    save_file(dev, tmp_path / "m.safetensors")
    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    monkeypatch.setenv("FLUX_MODEL", str(tmp_path / "m.safetensors"))
    load_flow_model("flux-dev", "cpu", verbose=False)
    load_ae("flux-nano", "cpu")
    load_t5("cpu", folder=NANO_FOLDER)
    load_clip("cpu", folder=NANO_FOLDER)


def test_host_memory_holds_one_tensor_at_a_time(tmp_path, monkeypatch, dev):
    """Whatever is read is handed on before the next one is."""
    import weakref

    path = tmp_path / "m.safetensors"
    save_file(dev, path)
    read, alive, most = StoredTensor.read, set(), 0

    def watched(self, device="cpu"):
        nonlocal most
        raw = read(self, device)
        alive.add(id(raw))
        weakref.finalize(raw, alive.discard, id(raw))
        most = max(most, len(alive))
        return raw

    monkeypatch.setattr(StoredTensor, "read", watched)
    spec = replace(configs["flux-dev"], params=tiny_models.PARAMS)
    OpenModel(spec, ModelFiles(path, path, path)).load_transformer("cpu", torch.bfloat16)
    assert most <= 2


@pytest.mark.parametrize("what", ["no permission", "cut while it is read"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, what):
    path = tmp_path / "m.safetensors"
    path.write_bytes(WHOLE)
    checkpoint = open_checkpoint(path)
    if what == "no permission":

        def refuse(*_, **__):
            raise OSError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    else:
        path.write_bytes(WHOLE[:-8])
    with pytest.raises(InputError, match="Permission denied|ends too early"):
        checkpoint.tensors["a"].read()
