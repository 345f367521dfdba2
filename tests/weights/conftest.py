"""A tiny transformer and its weights, and published models of its size."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import save_file

from flux.specs import configs
from flux.util import load_flow_model


@pytest.fixture(scope="package")
def source():
    return tiny_models.flux()


@pytest.fixture(scope="package")
def weights(source):
    return source.state_dict()


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
