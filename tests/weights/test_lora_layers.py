"""A LoRA in some layers only, or with another strength in each."""

import json

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import MODULES, STRENGTH, added, close, file_of, pairs

from flux.errors import InputError
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.settings.files import check_settings
from flux.weights.find import checkpoint_of
from flux.weights.lora_places import layer_of

NUM_DOUBLE = tiny_models.NUM_DOUBLE
OUTSIDE = ["img_in", "time_in.in_layer", "final_layer.adaLN_modulation.1", "final_layer.linear"]


@pytest.fixture
def base(weights, tmp_path):
    return weight_files.save(weights, tmp_path / "base.safetensors")


@pytest.fixture
def lora(weights, tmp_path):
    file = file_of(pairs(weights), lambda m: m, None, "lora_A", "lora_B")
    return weight_files.save(file, tmp_path / "lora.safetensors")


def test_layers_count_over_both_stacks():
    found = {module: layer_of(module, NUM_DOUBLE) for module in MODULES}
    assert [module for module, layer in found.items() if layer is None] == OUTSIDE
    assert found["double_blocks.2.txt_attn.proj"] == 2
    assert found["single_blocks.0.modulation.lin"] == 3
    assert found["single_blocks.3.linear2"] == 6


def test_a_list_is_of_the_layers_that_it_changes(weights, base, lora):
    kept = {m: pair for m, pair in pairs(weights).items() if layer_of(m, NUM_DOUBLE) in (None, 0, 6)}
    model = weight_files.load(base, loras=[(lora, STRENGTH, (6, 0))])
    assert close(model, added(weights, kept, STRENGTH))


def test_a_map_has_factors(weights, base, lora):
    """Layers that it does not name have all of the strength, those with 0 nothing."""
    factors = {0: 0.0, 2: -1.5}
    expected = weights
    for module, pair in pairs(weights).items():
        factor = factors.get(layer_of(module, NUM_DOUBLE), 1.0)
        expected = added(expected, {module: pair}, STRENGTH * factor)
    assert close(weight_files.load(base, loras=[(lora, STRENGTH, factors)]), expected)


def test_a_layer_left_out_is_left_bit_for_bit(tmp_path, weights, base):
    """Its replaced norms too, which no strength scales."""
    scale = "double_blocks.1.img_attn.norm.query_norm.scale"
    path = weight_files.save({scale: weights[scale] + 0.5}, tmp_path / "norm.safetensors")
    plain = weight_files.load(base)
    assert weight_files.same(weight_files.load(base, loras=[(path, 1.0, (0,))]), plain)
    assert not weight_files.same(weight_files.load(base, loras=[(path, 1.0, (1,))]), plain)


def test_layers_that_the_model_lacks(base, lora):
    with pytest.raises(InputError, match=r"Got layers \[7\], but this model numbers its layers 0\.\.6"):
        weight_files.load(base, loras=[(lora, 1.0, {7: 0.5})])


def test_another_choice_is_another_checkpoint(tmp_path):
    file = {f"img_in.lora_{each}.weight": torch.zeros(2, 2) for each in "AB"}
    path = weight_files.save(file, tmp_path / "lora.safetensors")

    def checkpoint(**choice):
        return checkpoint_of(ModelSettings(lora=[{"file": str(path), **choice}]))

    found = [checkpoint(), checkpoint(layers=[1, 2]), checkpoint(layers={1: 0.5}), checkpoint(layers=[1])]
    assert len(set(found)) == 4


def test_layers_in_settings_come_back_from_json():
    """JSON's keys are texts. Without layers, a run.json is as it was before there was the field."""
    lora = [{"file": "x.safetensors", "layers": {"3": 0.5}}, {"file": "y", "layers": [1, 2]}, "z"]
    settings = check_settings(GenerateSettings, {"prompts": ["a dog"], "lora": lora})
    assert [each.layers for each in settings.lora] == [{3: 0.5}, (1, 2), None]
    written = json.loads(json.dumps(settings.to_json()))
    assert written["lora"][2] == {"file": "z", "weight": 1.0}
    assert check_settings(GenerateSettings, written) == settings


@pytest.mark.parametrize("layers", [[], [1, 1], [-1], ["a"], {"a": 1}, {"1": "b"}, "all"])
def test_wrong_layers_are_refused(layers):
    with pytest.raises(InputError, match="lora"):
        check_settings(ModelSettings, {"lora": [{"file": "x", "layers": layers}]})
