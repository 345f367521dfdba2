"""The bundled models in every combination of file form, quantisation, compilation, offloading and LoRA."""

from functools import cache
from itertools import product

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import file_of, pairs

from flux.loaded_model import LoadedModel
from flux.model import Flux, Inputs
from flux.modules.layers import Block
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights.load import read_weights

MODELS = ("flux-nano", "flux-nano-schnell")
FORMS = ("own", "diffusers", "Q8_0", "shards")
QUANTIZE = ("none", "8bit", "4bit", "fp8")
COMPILE, LORA = (False, True), ("none", "LoRA", "DoRA", "OFT")
OFFLOAD = ("none", "model", "blocks", "auto")
# Relative error of one velocity against the plain model; Q8_0 alone makes 0.02.
BOUNDS = {"none": 0.04, "8bit": 0.06, "fp8": 0.2, "4bit": 0.5}
ALL = [
    case
    for case in product(MODELS, FORMS, QUANTIZE, COMPILE, OFFLOAD, LORA)
    if case[3] is False or case[5] in LORA[:2]
]
# Each pair of a form and a quantisation once, the other choices in turn; each of both compiled once.
SOME = [
    (
        MODELS[(i + i // 4) % 2],
        form,
        quantize,
        i // 4 == i % 4,
        OFFLOAD[(i + i // 4) % 4],
        LORA[i // 3 % 4],
    )
    for i, (form, quantize) in enumerate(product(FORMS, QUANTIZE))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """flux-nano's transformer in each form, and LoRAs for modules inside and outside the blocks."""
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
    rows = {module: len(weights[f"{module}.weight"]) for module in modules}
    lengths = {f"{m}.dora_scale": weights[f"{m}.weight"].norm(dim=1, keepdim=True) * 1.1 for m in modules}
    generator = torch.Generator().manual_seed(0)
    blocks = {
        f"{m}.oft_blocks": torch.randn(rows[m] // 20, 20, 20, generator=generator) / 50 for m in modules
    }
    changes = {"LoRA": lora, "DoRA": lora | lengths, "OFT": blocks}
    loras = {name: weight_files.save(change, folder / name) for name, change in changes.items()}
    own = {"own": None, "Q8_0": folder / "m.gguf", "diffusers": folder / "diffusers.safetensors"}
    return {**own, "shards": folder / "shards", **loras}


def load(
    files, model, form="own", quantize="none", compiled=False, offload="none", lora="none"
) -> LoadedModel:
    settings = ModelSettings(
        model=model,
        weights=None if files[form] is None else str(files[form]),
        device="cpu",
        dtype="float32",
        quantize=quantize,
        compile=compiled,
        offload=offload,
        lora=() if lora == "none" else ({"file": str(files[lora])},),
    )
    return LoadedModel.load(resolve(settings))


def velocity(pipe: LoadedModel) -> torch.Tensor:
    given = tiny_models.inputs(2, params=configs["flux-nano"].params)
    with pipe.denoising() as model:
        return model.observe(Inputs(**given))[0]


@pytest.fixture(scope="module")
def expected(files):
    """The velocity of a plain model with a LoRA, by their names."""

    @cache
    def compute(model: str, lora: str) -> torch.Tensor:
        with torch.inference_mode():
            return velocity(load(files, model, lora=lora))

    return compute


@pytest.fixture
def eager(monkeypatch):
    """Compile by tracing alone, without a compiler."""
    compile_run = Block.compile
    monkeypatch.setattr(Block, "compile", lambda block, **how: compile_run(block, backend="eager", **how))


def check(files, expected, case) -> None:
    model, form, quantize, compiled, offload, lora = case
    pipe = load(files, model, form, quantize, compiled, offload, lora)
    assert isinstance(pipe.model, Flux)
    error = tiny_models.relative_error(velocity(pipe), expected(model, lora))
    assert error < BOUNDS[quantize], error
    torch.compiler.reset()


@pytest.mark.parametrize("case", SOME, ids=lambda case: " ".join(map(str, case)))
def test_some_combinations(files, expected, eager, case):
    check(files, expected, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: " ".join(map(str, case)))
def test_all_combinations(files, expected, eager, case):
    check(files, expected, case)
