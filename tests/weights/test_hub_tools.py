"""Downloads of models whose files are in several repositories; text encoders that another model brought."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.condition_models import REDUX_SIZES, save_depth_model, save_redux_adapter, save_siglip
from helpers.hub_server import FILES, FLOW
from huggingface_hub import constants

from flux import cli
from flux.errors import InputError
from flux.modules.image_embedders import DepthImageEncoder, ReduxImageEncoder
from flux.specs import configs
from flux.weights.hub import IMAGE_ENCODER_FILES, download, own_file, own_text_folder


@pytest.fixture
def published(server, monkeypatch):
    """A hub that has the files of the conditioned models too."""
    for name in (
        "flux1-fill-dev",
        "flux1-kontext-dev",
        "flux1-depth-dev",
        "flux1-canny-dev-lora",
        "flux1-redux-dev",
    ):
        monkeypatch.setitem(FILES, f"{name}.safetensors", FLOW + name.encode())
    for name in IMAGE_ENCODER_FILES:
        monkeypatch.setitem(FILES, name, FLOW if name.endswith(".safetensors") else b"{}" + name.encode())
    return server


@pytest.mark.parametrize(
    ("model", "repositories"),
    [
        ("flux-dev-kontext", {"FLUX.1-Kontext-dev": {"flux1-kontext-dev.safetensors", "ae.safetensors"}}),
        (
            "flux-dev-canny-lora",
            {
                "FLUX.1-dev": {"flux1-dev.safetensors"},
                "FLUX.1-Canny-dev-lora": {"flux1-canny-dev-lora.safetensors"},
            },
        ),
        (
            "flux-dev-redux",
            {"FLUX.1-dev": {"flux1-dev.safetensors"}, "FLUX.1-Redux-dev": {"flux1-redux-dev.safetensors"}},
        ),
    ],
)
def test_the_command_fetches_from_each_repository(published, model, repositories, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux", "download", model])
    cli.app()
    paths = [Path(line.strip()) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    for repository, names in repositories.items():
        found = {path.name for path in paths if f"models--black-forest-labs--{repository}/" in f"{path}/"}
        assert names <= found
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    ("model", "save"), [("flux-dev-depth", save_depth_model), ("flux-dev-redux", save_siglip)]
)
def test_the_image_encoder_is_fetched_too(published, model, save, tmp_path, monkeypatch, capsys):
    """Then it loads by its name without a network."""
    folder, adapter = save(tmp_path / "encoder"), save_redux_adapter(tmp_path / "redux.safetensors")
    for path in folder.iterdir():
        monkeypatch.setitem(FILES, path.name, path.read_bytes())

    def weights(*source: Path) -> dict[str, torch.Tensor]:
        if model == "flux-dev-depth":
            return DepthImageEncoder("cpu", *source).depth_model.state_dict()
        return ReduxImageEncoder("cpu", adapter, *REDUX_SIZES, torch.float32, *source).siglip.state_dict()

    download(model)
    assert "(Apache-2.0)" in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.asked.clear()
    found, expected = weights(), weights(folder)
    assert published.asked == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_lora_of_a_repository_of_its_own(published):
    spec = configs["flux-dev-canny-lora"]
    path = own_file(spec, spec.lora_filename, True, spec.lora_repo_id)
    assert path.read_bytes() == FLOW + b"flux1-canny-dev-lora"
    assert "models--black-forest-labs--FLUX.1-Canny-dev-lora" in str(path)
    with pytest.raises(
        InputError, match=r"flux1-dev\.safetensors of black-forest-labs/FLUX\.1-dev .* HF_HUB"
    ):
        own_file(spec, spec.repo_flow, False)


def test_text_encoders_that_another_model_brought(published, capsys):
    """They are the same in all repositories, and are 10 GB."""
    folder = own_text_folder(configs["flux-dev"], True)
    published.asked.clear()
    assert own_text_folder(configs["flux-dev-kontext"], True) == folder
    assert own_text_folder(configs["flux-schnell"], False) == folder
    assert published.asked == []
