"""The bundled models in every combination of file form, quantisation, compilation, offloading and LoRA."""

from itertools import product

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import file_of, pairs

from flux.model import Flux, Inputs
from flux.modules.layers import Block
from flux.pipeline import Pipeline
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights.load import read_weights

MODELS = ("flux-nano", "flux-nano-schnell")
FORMS = ("own", "diffusers", "Q8_0", "shards")
QUANTIZE = ("none", "8bit", "4bit", "fp8")
COMPILE, LORA = (False, True), (False, True)
OFFLOAD = ("none", "model", "blocks", "auto")
# Relative error of one velocity against the plain model; Q8_0 alone makes 0.02.
BOUNDS = {"none": 0.04, "8bit": 0.06, "fp8": 0.2, "4bit": 0.5}
ALL = list(product(MODELS, FORMS, QUANTIZE, COMPILE, OFFLOAD, LORA))
# Each pair of a form and a quantisation once, the other choices in turn.
SOME = [
    (
        MODELS[(i + i // 4) % 2],
        form,
        quantize,
        COMPILE[i // 2 % 2],
        OFFLOAD[(i + i // 4) % 4],
        LORA[i // 3 % 2],
    )
    for i, (form, quantize) in enumerate(product(FORMS, QUANTIZE))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """flux-nano's transformer in each form, and a LoRA for modules inside and outside the blocks."""
    folder = tmp_path_factory.mktemp("forms")
    weights = read_weights(NANO_FOLDER / "transformer.safetensors", "cpu", torch.float32)
    weight_files.save_gguf(
        weights, folder / "m.gguf", "Q8_0", pack=lambda name, x: x.ndim == 2 and x.shape[1] % 32 == 0
    )
    model = weight_files.model_of(weights, configs["flux-nano"].params)
    tiny_models.diffusers_transformer(model).save_pretrained(folder / "shards", max_shard_size="20MB")
    theirs = tiny_models.to_diffusers_transformer(weights, configs["flux-nano"].params.hidden_size)
    weight_files.save(theirs, folder / "diffusers.safetensors")
    modules = ("time_in.out_layer", "double_blocks.0.img_attn.qkv", "single_blocks.2.linear1", "img_in")
    lora = file_of(pairs(weights, modules), lambda module: module, 0.4, "lora_A", "lora_B")
    weight_files.save(lora, folder / "lora.safetensors")
    own = {"own": None, "Q8_0": folder / "m.gguf", "diffusers": folder / "diffusers.safetensors"}
    return {**own, "shards": folder / "shards", "lora": folder / "lora.safetensors"}


def load(files, model, form="own", quantize="none", compiled=False, offload="none", lora=False) -> Pipeline:
    settings = ModelSettings(
        model=model,
        weights=None if files[form] is None else str(files[form]),
        device="cpu",
        dtype="float32",
        quantize=quantize,
        compile=compiled,
        offload=offload,
        lora=({"file": str(files["lora"])},) if lora else (),
    )
    return Pipeline.load(resolve(settings))


def velocity(pipe: Pipeline) -> torch.Tensor:
    given = tiny_models.inputs(2, params=configs["flux-nano"].params)
    with pipe.denoising() as model:
        return model.observe(Inputs(**given))[0]


@pytest.fixture(scope="module")
def expected(files):
    with torch.inference_mode():
        return {(model, lora): velocity(load(files, model, lora=lora)) for model in MODELS for lora in LORA}


@pytest.fixture
def eager(monkeypatch):
    """Compile by tracing alone, without a compiler."""
    compile_run = Block.compile
    monkeypatch.setattr(Block, "compile", lambda block, **how: compile_run(block, backend="eager", **how))


def check(files, expected, case) -> None:
    model, form, quantize, compiled, offload, lora = case
    pipe = load(files, model, form, quantize, compiled, offload, lora)
    assert isinstance(pipe.model, Flux)
    error = tiny_models.relative_error(velocity(pipe), expected[model, lora])
    assert error < BOUNDS[quantize], error
    torch.compiler.reset()


@pytest.mark.parametrize("case", SOME, ids=lambda case: " ".join(map(str, case)))
def test_some_combinations(files, expected, eager, case):
    check(files, expected, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: " ".join(map(str, case)))
def test_all_combinations(files, expected, eager, case):
    check(files, expected, case)
