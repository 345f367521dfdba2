"""Opened LoRA files: the models that each fits, whose names it has, and who made it."""

import json

import pytest
import torch
from helpers import weight_files
from helpers.lora_files import file_of, pairs

from flux.errors import InputError
from flux.lora.contents import layer_name, open_lora, open_loras
from flux.specs import NANO_FOLDER

MODULES = ("double_blocks.2.img_attn.proj", "single_blocks.3.linear2", "img_in")
NAMES = {
    "kohya": lambda m: "lora_unet_" + m.replace(".", "_"),
    "ComfyUI": lambda m: "diffusion_model." + m,
    "BFL": lambda m: m,
    "PEFT, on BFL's names": lambda m: "base_model.model." + m,
}


@pytest.fixture
def save(weights, tmp_path):
    def saved(names="BFL", modules=MODULES, **metadata):
        file = file_of(pairs(weights, modules), NAMES[names], 2.0)
        return weight_files.save(file, tmp_path / "lora.safetensors", **metadata)

    return saved


@pytest.mark.parametrize("names", NAMES)
def test_models_and_names(tiny, save, names):
    lora = open_lora(save(names))
    assert lora.models == ("flux-dev", "flux-schnell")
    assert lora.names == names
    assert lora.form == "LoRA"
    assert lora.layers == [2, 6]
    assert lora.num_layers == 7
    assert lora.vital_layers == (1, 4)


def test_a_lora_of_full_size_is_known_by_one_layer(tmp_path):
    """Told by the shapes of one layer: no weights of the model are there."""
    pair = {"lora_A.weight": torch.zeros(4, 15360), "lora_B.weight": torch.zeros(3072, 4)}
    file = {f"transformer.single_transformer_blocks.7.proj_out.{name}": x for name, x in pair.items()}
    lora = open_lora(weight_files.save(file, tmp_path / "lora"))
    assert {"flux-dev", "flux-schnell"} <= set(lora.models)
    assert not {"flux-nano", "flux-nano-schnell"} & set(lora.models)
    assert lora.names == "diffusers"
    assert lora.layers == [26]
    assert layer_name(26, lora.params.depth) == "single 7"


def test_the_packages_own_lora_is_known():
    lora = open_lora(NANO_FOLDER / "schnell_lora.safetensors")
    assert lora.models[0] == "flux-nano"
    assert lora.layers == list(range(15))


@pytest.mark.parametrize(
    ("metadata", "trainer"),
    [
        ({}, None),
        ({"ss_network_module": "networks.lora_flux"}, "kohya sd-scripts, or a trainer built on it"),
        ({"software": json.dumps({"name": "ai-toolkit", "version": "0.9"})}, "ai-toolkit 0.9"),
        ({"software": "[]"}, None),
        ({"software": "[" * 100_000}, "[" * 100),
        ({"software": "my trainer"}, "my trainer"),
        ({"ot_revision": "abc", "ss_network_module": "x"}, "OneTrainer"),
    ],
)
def test_the_trainer_is_told_by_the_metadata(tiny, save, metadata, trainer):
    assert open_lora(save(**metadata)).trainer == trainer


def test_telling_metadata_is_short(tiny, save):
    found = open_lora(save(ss_steps="1500", other="x", base_model="y" * 500)).telling_metadata()
    assert found == {"ss_steps": "1500", "base_model": "y" * 100}


def test_text_encoders_are_counted(tiny, weights, tmp_path):
    file = file_of(pairs(weights, MODULES), lambda m: m, None)
    for module in (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
    ):
        file |= {
            f"{module}.lora_down.weight": torch.zeros(2, 4),
            f"{module}.lora_up.weight": torch.zeros(4, 2),
        }
    assert open_lora(weight_files.save(file, tmp_path / "lora")).text_encoders == {"text_encoder": 2}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["input_blocks.1.0.lora_A.weight"], "a LoRA for Stable Diffusion, take one for FLUX.1"),
        (["something.weight"], "belong to no part"),
        (["lora_te1_x.lora_down.weight"], "text encoders alone"),
        (["img_in.boft_R"], "is a BOFT"),
    ],
)
def test_files_that_are_no_loras_for_flux_are_refused(tiny, tmp_path, names, message):
    path = weight_files.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "lora")
    with pytest.raises(InputError, match=message):
        open_lora(path)


def test_the_error_is_that_of_the_model_whose_width_it_has(tmp_path):
    pair = {"lora_A.weight": torch.zeros(4, 320), "lora_B.weight": torch.zeros(959, 4)}
    path = weight_files.save(
        {f"double_blocks.0.img_attn.qkv.{name}": x for name, x in pair.items()}, tmp_path / "x"
    )
    with pytest.raises(InputError, match="expected one of 960 x 320"):
        open_lora(path)


def test_rank_0_changes_nothing(tiny, tmp_path):
    pair = {
        "lora_A.weight": torch.zeros(0, 32),
        "lora_B.weight": torch.zeros(96, 0),
        "alpha": torch.tensor(1.0),
    }
    path = weight_files.save(
        {f"double_blocks.0.img_attn.qkv.{name}": x for name, x in pair.items()}, tmp_path / "x"
    )
    assert open_lora(path).layers == [0]


def test_a_model_is_no_lora(base):
    with pytest.raises(InputError, match=r"which is a FLUX\.1 transformer .*; expected a LoRA"):
        open_lora(base)


def test_loras_for_two_models_are_refused(tiny, save):
    with pytest.raises(InputError, match=r"a LoRA for flux-nano, and .*, one for flux-dev"):
        open_loras([NANO_FOLDER / "schnell_lora.safetensors", save()])
