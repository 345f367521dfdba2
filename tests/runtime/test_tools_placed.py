"""Models with wider inputs in fewer bits, streamed and planned: flux-nano with more input columns."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import file_of, pairs

from flux.inputs import Inputs
from flux.loaded_model import LoadedModel
from flux.runtime.estimate import MemoryEstimator
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights.find import find_model
from flux.weights.load import read_weights

NANO = configs["flux-nano"]
# Relative error of one velocity against the plain model. Measured: 0, 0.014 and 0.124.
BOUNDS = {"none": 0, "8bit": 0.03, "4bit": 0.25}


@pytest.fixture(scope="module")
def weights():
    return read_weights(NANO_FOLDER / NANO.repo_flow, "cpu", torch.float32)


@pytest.fixture
def small(monkeypatch):
    """The large models' specs with flux-nano's sizes and files."""
    sizes = {
        name: getattr(NANO, name) for name in ("ae_params", "size", "text_length", "clip_length", "folder")
    }
    for name in ("flux-dev-fill", "flux-dev-canny-lora"):
        spec = configs[name]
        params = replace(NANO.params, in_channels=spec.params.in_channels)
        base = NANO.params if spec.lora_filename else None
        monkeypatch.setitem(configs, name, replace(spec, params=params, base_params=base, **sizes))


def load(model: str, **fields) -> LoadedModel:
    return LoadedModel.load(resolve(ModelSettings(model=model, device="cpu", dtype="float32", **fields)))


def velocity(pipe: LoadedModel) -> torch.Tensor:
    given = tiny_models.inputs(1, params=pipe.model.params)
    with pipe.denoising() as model:
        return model.observe(Inputs(**given))[0]


def check_bytes(pipe: LoadedModel, model: str, **fields) -> None:
    """The bytes of the transformer that are planned are those that it has."""
    settings = resolve(ModelSettings(model=model, device="cpu", dtype="float32", **fields))
    opened, dtype = find_model(settings), torch.float32
    estimate = MemoryEstimator(
        settings, opened.spec, opened.sources(), dtype, dtype, False, opened.ranks_beside()
    )
    used = sum(x.nbytes for x in (*pipe.model.parameters(), *pipe.model.buffers()))
    assert estimate.transformer.total == used


@pytest.fixture
def fill(small, weights, tmp_path) -> str:
    columns = torch.randn(NANO.params.hidden_size, 320, generator=torch.Generator().manual_seed(0)) * 0.02
    wide = torch.cat((weights["img_in.weight"], columns), dim=1)
    return str(weight_files.save(weights | {"img_in.weight": wide}, tmp_path / "fill.safetensors"))


@pytest.fixture
def control(small, weights, tmp_path) -> dict[str, str]:
    """A GGUF base and a control LoRA for a few modules."""
    path = tmp_path / "base.gguf"
    weight_files.save_gguf(weights, path, "Q8_0", pack=lambda name, x: x.ndim == 2 and x.shape[1] % 32 == 0)
    wide = {"img_in.weight": torch.zeros(NANO.params.hidden_size, 128)}
    chosen = pairs(weights | wide, ["img_in", "double_blocks.0.img_attn.qkv", "single_blocks.3.linear2"])
    lora = weight_files.save(file_of(chosen, str, downs="lora_A", ups="lora_B"), Path(tmp_path / "lora"))
    return {"weights": str(path), "lora_weights": str(lora)}


@pytest.mark.parametrize(("quantize", "offload"), [("none", "blocks"), ("8bit", "auto"), ("4bit", "model")])
def test_a_fill_model(fill, quantize, offload):
    plain = load("flux-dev-fill", weights=fill)
    placed = load("flux-dev-fill", weights=fill, quantize=quantize, offload=offload)
    assert tiny_models.relative_error(velocity(placed), velocity(plain)) <= BOUNDS[quantize]
    check_bytes(placed, "flux-dev-fill", weights=fill, quantize=quantize)


def test_a_control_lora_over_gguf(control):
    plain, placed = (load("flux-dev-canny-lora", **control, offload=how) for how in ("none", "blocks"))
    assert torch.equal(velocity(placed), velocity(plain))
    check_bytes(plain, "flux-dev-canny-lora", **control)
