"""A tiny transformer and its weights, published models of its size, and a hub on this machine."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.hub_server import Answers, Hub, lie_at
from huggingface_hub import constants
from safetensors.torch import save_file

from flux.specs import configs
from flux.util import load_flow_model


@pytest.fixture(scope="package")
def source():
    return tiny_models.flux()


@pytest.fixture(scope="package")
def weights(source):
    return source.state_dict()


@pytest.fixture(scope="package")
def base(weights, tmp_path_factory):
    """The file of these weights."""
    return weight_files.save(weights, tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def small(monkeypatch):
    """The published models with the tiny model's sizes, so that their files fit a test."""
    for name in ("flux-dev", "flux-schnell"):
        spec = configs[name]
        params = replace(tiny_models.PARAMS, guidance_embed=spec.params.guidance_embed)
        monkeypatch.setitem(configs, name, replace(spec, params=params, ae_params=tiny_models.AE_PARAMS))


@pytest.fixture
def load(small, tmp_path, monkeypatch):
    """Save weights to a file, and load them as flux-dev or another model."""

    def save_and_load(weights, name="flux-dev", dtype=torch.float32):
        path = tmp_path / "weights.safetensors"
        save_file({key: x.contiguous() for key, x in weights.items()}, path)
        monkeypatch.setenv("FLUX_MODEL", str(path))
        return load_flow_model(name, "cpu", verbose=False, dtype=dtype)

    return save_and_load


@pytest.fixture(scope="package")
def running():
    server = Hub(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def server(running, tmp_path, monkeypatch):
    """A hub with nothing wrong, an empty cache, and pauses that take no time."""
    running.reset()
    running.pauses = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    lie_at(f"http://127.0.0.1:{running.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(time, "sleep", running.pauses.append)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return running
