"""A tiny transformer's weights, and models of its size by the published names."""

from dataclasses import replace

import pytest
from helpers import lora_training, tiny_models, weight_files

from flux.specs import configs


@pytest.fixture(scope="package")
def weights():
    return tiny_models.flux().state_dict()


@pytest.fixture(scope="package")
def base(weights, tmp_path_factory):
    """The file of these weights."""
    return weight_files.save(weights, tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture
def tiny(monkeypatch):
    """flux-dev and flux-schnell in the tiny model's sizes, and no other models but flux-nano."""
    kept = dict(configs)
    for name, spec in kept.items():
        if name in ("flux-dev", "flux-schnell"):
            params = replace(tiny_models.PARAMS, guidance_embed=spec.params.guidance_embed)
            configs[name] = replace(spec, params=params, vital_layers=(1, 4))
        elif not name.startswith("flux-nano"):
            del configs[name]
    yield
    # A test's own patches first: undone later, they would bring the tiny sizes back.
    monkeypatch.undo()
    # In the order in which they were: messages list them.
    configs.clear()
    configs.update(kept)


@pytest.fixture
def tiny_nano():
    """flux-nano in the sizes of a transformer whose training takes milliseconds a step."""
    with lora_training.tiny_nano():
        yield
