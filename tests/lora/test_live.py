"""A LoRA beside a loaded model computes what loading with that strength computes, in every form."""

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import MODULES, added, file_of, pairs

from flux.errors import InputError
from flux.inputs import Inputs
from flux.loaded_model import LoadedModel
from flux.lora.live import LiveModel, load_live
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER
from flux.weights.checkpoint import open_checkpoint
from flux.weights.lora import read_lora
from flux.weights.open_model import LoraUse, ModelFiles, OpenModel

QKV, PROJ = "double_blocks.1.img_attn.qkv", "double_blocks.1.img_attn.proj"
NORM = "single_blocks.0.norm.query_norm.scale"


def low_rank(weights):
    file = file_of(pairs(weights, MODULES), lambda m: m, 2.0, "lora_A", "lora_B")
    pair = {"lora_A.weight": torch.randn(2, 32), "lora_B.weight": torch.randn(32, 2)}
    parts = [f"transformer.transformer_blocks.1.attn.to_{part}" for part in "qv"]
    file |= {f"{part}.{name}": x for part in parts for name, x in pair.items()}
    return {**file, "double_blocks.0.img_attn.qkv.lora_B.bias": torch.randn(96)}


def lokr(weights):
    return {
        f"{QKV}.lokr_w1": torch.randn(12, 4),
        f"{QKV}.lokr_w2": torch.randn(8, 8),
        f"{PROJ}.diff_b": torch.randn(32),
    }


def oft(weights):
    return {f"{PROJ}.oft_blocks": 0.1 * torch.randn(4, 8, 8), NORM: weights[NORM] + 0.5}


FORMS = {"low rank": low_rank, "lokr": lokr, "oft": oft}


@pytest.fixture
def load(base, weights, tmp_path):
    """A transformer with a LoRA beside it, and the LoRA's file."""
    torch.manual_seed(0)

    def loaded(form, path=base, params=tiny_models.PARAMS, held=weights):
        file = weight_files.save(FORMS[form](held), tmp_path / "lora.safetensors")
        opened = LiveModel(
            OpenModel(weight_files.spec(params), ModelFiles(path, path, path, loras=(LoraUse(file),))),
            read_lora(open_checkpoint(file)),
        )
        model = opened.load_transformer("cpu", torch.float32)
        return model, opened.live, file

    return loaded


def error(model, base, file, **layers):
    expected = weight_files.load(base, loras=[(file, 1.0, layers.get("layers"))])
    return tiny_models.relative_error(weight_files.velocity(model), weight_files.velocity(expected))


@pytest.mark.parametrize("form", FORMS)
def test_strengths(load, base, form):
    """Full, with one layer at a half and one left out, and full again."""
    model, live, file = load(form)
    first = weight_files.velocity(model)
    assert error(model, base, file) < 2e-6
    live.set_strength(1.0, {1: 0.0, 3: 0.5})
    assert not torch.equal(weight_files.velocity(model), first)
    factors = {1: 0.0, 3: 0.5}
    if form != "oft":  # the strength of a replaced norm is 0 or 1 in a file
        assert error(model, base, file, layers=factors) < 2e-6
    live.set_strength(1.0)
    assert torch.equal(weight_files.velocity(model), first)


@pytest.mark.parametrize("form", FORMS)
def test_strength_0_is_the_model_bit_for_bit(load, base, form):
    model, live, _ = load(form)
    live.set_strength(0.0)
    assert weight_files.same(model, weight_files.load(base))


def test_layers(load):
    assert load("low rank")[1].layers == [0, 1, 2, 3, 4, 6]
    assert load("oft")[1].layers == [1, 3]


def test_over_packed_weights(load, tmp_path):
    own = weight_files.wide().state_dict()
    held = weight_files.save_gguf(own, tmp_path / "m.gguf", "Q8_0")
    chosen = pairs(own, ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"))
    file = weight_files.save(file_of(chosen, lambda m: m, None), tmp_path / "lora")
    files = ModelFiles(*[tmp_path / "m.gguf"] * 3)
    opened = LiveModel(
        OpenModel(weight_files.spec(weight_files.WIDE), files), read_lora(open_checkpoint(file))
    )
    model = opened.load_transformer("cpu", torch.float32)
    whole = weight_files.model_of(added(held, chosen, 1.0), weight_files.WIDE)
    assert tiny_models.relative_error(weight_files.velocity(model), weight_files.velocity(whole)) < 2e-6
    opened.live.set_strength(0.0)
    plain = weight_files.model_of(held, weight_files.WIDE)
    assert tiny_models.relative_error(weight_files.velocity(model), weight_files.velocity(plain)) < 2e-6


def test_quantised_and_offloaded():
    """The branch moves with its block; strength 0 is the model without the LoRA."""
    settings = ModelSettings(
        lora=[str(NANO_FOLDER / "schnell_lora.safetensors")],
        device="cpu",
        dtype="float32",
        quantize="8bit",
        offload="blocks",
    )
    pipe, live = load_live(settings)
    plain = LoadedModel.load(settings.model_copy(update={"lora": ()}))
    given = Inputs(**tiny_models.inputs(1, params=pipe.spec.params))

    def velocity(pipe):
        with pipe.denoising() as model:
            return model.observe(given)[0]

    full = velocity(pipe)
    live.set_strength(0.0)
    assert torch.equal(velocity(pipe), velocity(plain))
    live.set_strength(1.0)
    assert torch.equal(velocity(pipe), full)
    assert not torch.equal(velocity(plain), full)


@pytest.mark.parametrize("loras", [[], ["x", "y"]])
def test_one_lora_is_asked_for(loras):
    with pytest.raises(InputError, match=f"Got {len(loras)} LoRAs, expected one"):
        load_live(ModelSettings(lora=loras))


def test_a_lora_of_another_model(base, tmp_path, weights):
    file = weight_files.save(file_of(pairs(weights, MODULES), lambda m: m), tmp_path / "lora")
    with pytest.raises(InputError, match="a difference for another model"):
        load_live(ModelSettings(lora=[str(file)]))
