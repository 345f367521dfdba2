"""Downloads of models whose files are in several repositories; text encoders that another model brought."""

import sys
from pathlib import Path

import pytest
from helpers.hub_server import FILES, FLOW

from flux import cli
from flux.errors import InputError
from flux.specs import configs
from flux.weights.hub import own_file, own_text_folder


@pytest.fixture
def published(server, monkeypatch):
    """A hub that has the files of the conditioned models too."""
    for name in ("flux1-fill-dev", "flux1-kontext-dev", "flux1-canny-dev-lora", "flux1-redux-dev"):
        monkeypatch.setitem(FILES, f"{name}.safetensors", FLOW + name.encode())
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
