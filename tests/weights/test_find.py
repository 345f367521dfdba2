"""Where the files of a model are found: paths, environment variables, one file or folder for everything."""

import shutil

import pytest
import torch
from helpers import tiny_models, weight_files
from safetensors.torch import load_file, save_file

from flux.errors import InputError
from flux.loaded_model import LoadedModel
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights import find
from flux.weights.find import find_model
from flux.weights.open_model import ModelFiles

T5, CLIP = "text_encoder_2", "text_encoder"
TEXTS = ["a dog on the grass", "a red car"]


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


def test_text_encoders_by_a_variable(tmp_path, monkeypatch):
    """A path in the settings wins over it. A leading ~ is the home folder, as in every variable."""
    save_file({"img_in.weight": torch.zeros(1)}, tmp_path / "flow.safetensors")
    save_file({"decoder.mid.attn_1.q.weight": torch.zeros(1)}, tmp_path / "ae.safetensors")
    monkeypatch.setenv("HOME", str(NANO_FOLDER.parent))
    monkeypatch.setenv("FLUX_TEXT_ENCODERS", "~/nano")
    paths = {"weights": str(tmp_path / "flow.safetensors"), "ae_weights": str(tmp_path / "ae.safetensors")}
    assert files_of("flux-dev", **paths).text == NANO_FOLDER
    monkeypatch.setenv("FLUX_TEXT_ENCODERS", "/nowhere")
    assert files_of("flux-dev", **paths, text_encoders=str(NANO_FOLDER)).text == NANO_FOLDER
    assert files_of("flux-nano").text == NANO_FOLDER, "the small models keep their own"
    with pytest.raises(InputError, match="Got /nowhere in FLUX_TEXT_ENCODERS, which does not exist"):
        files_of("flux-dev", **paths)


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
    with pytest.raises(InputError, match=f"Got /nowhere.safetensors in {variable}, which does not exist"):
        files_of("flux-dev")


def test_another_models_file_is_told_before_anything_is_downloaded(small, weights, tmp_path, monkeypatch):
    """A dev file in place of a schnell file, by its names."""
    monkeypatch.setattr(find, "own_file", lambda *_: pytest.fail("went to the hub"))
    monkeypatch.setattr(find, "own_text_folder", lambda *_: pytest.fail("went to the hub"))
    path = weight_files.save(weights, tmp_path / "flux1-schnell.safetensors")
    with pytest.raises(InputError, match=r"it is a dev file .* load it as flux-dev"):
        files_of("flux-schnell", weights=str(path))


def test_a_text_folder_that_lacks_something(tmp_path):
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="no folder text_encoder_2 or tokenizer_2"):
        files_of("flux-nano", text_encoders=str(tmp_path))


def test_a_file_in_place_of_the_text_folder(tmp_path):
    name = "encoder.final_layer_norm.weight"
    path = weight_files.save({name: torch.zeros(1)}, tmp_path / "t5xxl_fp16.safetensors")
    expected = r"which is a T5 encoder \(give it as t5_weights\); expected a folder with text_encoder, "
    with pytest.raises(InputError, match=expected):
        files_of("flux-nano", text_encoders=str(path))


def nano_in_one() -> dict[str, torch.Tensor]:
    """All tensors of flux-nano's files as they are stored, 8-bit numbers beside their scales."""
    spec = configs["flux-nano"]
    files = {
        "model.diffusion_model.": spec.repo_flow,
        "vae.": spec.repo_ae,
        "text_encoders.t5xxl.transformer.": f"{T5}/model.safetensors",
        "text_encoders.clip_l.transformer.": f"{CLIP}/model.safetensors",
    }
    parts = {prefix: load_file(spec.folder / file) for prefix, file in files.items()}
    return {prefix + name: x for prefix, part in parts.items() for name, x in part.items()}


def test_all_in_one(tmp_path):
    """All four models come out of the one file: the package's own may be anything."""
    extra = {
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "text_encoders.t5xxl.logit_scale": torch.ones(()),
    }
    path = weight_files.save(nano_in_one() | extra, tmp_path / "all.safetensors")
    settings, spec = ModelSettings(weights=str(path), device="cpu", dtype="float32"), configs["flux-nano"]
    files = find_model(settings).files
    assert (files.flow, files.ae, files.t5, files.clip) == (path,) * 4
    assert files.text == NANO_FOLDER
    pipe = LoadedModel.load(resolve(settings))
    plain = LoadedModel.load(resolve(ModelSettings(device="cpu", dtype="float32")))
    for model in ("t5", "clip"):
        assert torch.equal(getattr(pipe, model)(TEXTS), getattr(plain, model)(TEXTS))
    for model, file in ((pipe.model, spec.repo_flow), (pipe.ae, spec.repo_ae)):
        held, got = tiny_models.unscaled(load_file(NANO_FOLDER / file)), model.state_dict()
        assert got.keys() == held.keys()
        assert all(torch.equal(got[name], held[name]) for name in held)


def test_a_whole_folder(tmp_path, source, monkeypatch):
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "transformer")
    tiny_models.diffusers_autoencoder(tiny_models.autoencoder()).save_pretrained(tmp_path / "vae")
    for name in (T5, CLIP, "tokenizer", "tokenizer_2"):
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    spec = weight_files.spec()
    monkeypatch.setitem(configs, "flux-dev", spec)
    model = find_model(ModelSettings(model="flux-dev", weights=str(tmp_path)))
    assert {model.files.of(part) for part in ("transformer", "vae", T5, CLIP)} == {tmp_path}
    model.check()
