"""LoRA files: the names and configurations of every trainer, and files that are refused."""

import json

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import ALPHA, MODULES, RANK, STRENGTH, added, close, file_of, pairs
from torch import Tensor

from flux.errors import InputError
from flux.modules.layers import timestep_embedding
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.specs import configs
from flux.weights.checkpoint import open_checkpoint
from flux.weights.find import checkpoint_of
from flux.weights.lora import read_lora

OWN_NAMES = {
    "kohya": (lambda m: "lora_unet_" + m.replace(".", "_"), ALPHA, "lora_down", "lora_up"),
    "ComfyUI": (lambda m: "diffusion_model." + m, ALPHA, "lora_A", "lora_B"),
    "ComfyUI, older": (lambda m: "diffusion_model." + m, None, "lora_down", "lora_up"),
    "BFL": (lambda m: m, None, "lora_A", "lora_B"),
    "fal": (lambda m: "base_model.model." + m, None, "lora_A", "lora_B"),
}


@pytest.mark.parametrize("origin", OWN_NAMES)
def test_own_names(tmp_path, weights, base, origin):
    names, alpha, downs, ups = OWN_NAMES[origin]
    chosen = pairs(weights)
    path = weight_files.save(file_of(chosen, names, alpha, downs, ups), tmp_path / "lora")
    expected = added(weights, chosen, STRENGTH * (1 if alpha is None else alpha / RANK))
    assert close(weight_files.load(base, loras=[(path, STRENGTH)]), expected)


def in_diffusers(chosen: dict, weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The same differences as diffusers' modules have them: a fused one shares its down and has its rows."""
    found = {}
    for module, (down, up) in chosen.items():
        for name, part in tiny_models.to_diffusers_transformer({f"{module}.weight": up}, 32).items():
            found[name.removesuffix(".weight")] = down, part
    return found


THEIR_NAMES = {
    "ai-toolkit": (lambda m: "transformer." + m, None, "lora_A", "lora_B"),
    "OneTrainer": (lambda m: "lora_transformer_" + m.replace(".", "_"), ALPHA, "lora_down", "lora_up"),
    "no prefix": (lambda m: m, ALPHA, "lora_A", "lora_B"),
}


@pytest.mark.parametrize("origin", THEIR_NAMES)
def test_names_of_diffusers(tmp_path, weights, base, origin):
    names, alpha, downs, ups = THEIR_NAMES[origin]
    chosen = pairs(weights)
    file = file_of(in_diffusers(chosen, weights), names, alpha, downs, ups)
    path = weight_files.save(file, tmp_path / "lora")
    expected = added(weights, chosen, STRENGTH * (1 if alpha is None else alpha / RANK))
    assert close(weight_files.load(base, loras=[(path, STRENGTH)]), expected)


def test_xlabs(tmp_path, weights, base):
    """qkv of a single block touches the first rows of linear1 only."""
    modules = {
        "double_blocks.0.img_attn.qkv": "double_blocks.0.processor.qkv_lora1",
        "double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
        "double_blocks.2.img_attn.proj": "double_blocks.2.processor.proj_lora1",
        "double_blocks.2.txt_attn.proj": "double_blocks.2.processor.proj_lora2",
        "single_blocks.1.linear1": "single_blocks.1.processor.qkv_lora",
        "single_blocks.2.linear2": "single_blocks.2.processor.proj_lora",
    }
    chosen = pairs(weights, modules)
    down, up = chosen["single_blocks.1.linear1"]
    short = {**chosen, "single_blocks.1.linear1": (down, up[:96])}
    path = weight_files.save(file_of(short, modules.get, None, "down", "up"), tmp_path / "lora")
    padded = torch.cat((up[:96], torch.zeros(len(up) - 96, RANK)))
    expected = added(weights, {**chosen, "single_blocks.1.linear1": (down, padded)}, 1.0)
    assert close(weight_files.load(base, loras=[(path, 1.0)]), expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_that_peft_writes(tmp_path, weights, base, rslora):
    """Its scale stands in adapter_config.json alone; some modules have one of their own."""
    from peft import LoraConfig, get_peft_model

    model = tiny_models.diffusers_transformer(tiny_models.flux())
    config = LoraConfig(
        r=RANK,
        lora_alpha=6,
        use_rslora=rslora,
        alpha_pattern={"transformer_blocks.1.attn.to_k": 3},
        target_modules=["to_q", "to_k", "proj_mlp", "norm.linear", "norm_out.linear"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path)
    given = tiny_models.inputs(2)
    arguments = {
        "hidden_states": given["img"],
        "encoder_hidden_states": given["txt"],
        "pooled_projections": given["y"],
        "timestep": given["timesteps"],
        "guidance": given["guidance"],
        "img_ids": given["img_ids"][0],
        "txt_ids": given["txt_ids"][0],
    }
    expected = adapted(**arguments, return_dict=False)[0]
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert (
            tiny_models.relative_error(
                weight_files.velocity(weight_files.load(base, loras=[(path, 1.0)])), expected
            )
            < 1e-5
        )


def test_a_file_that_diffusers_writes(tmp_path, base):
    """The scale stands in the header."""
    from diffusers import FluxPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = tiny_models.diffusers_transformer(tiny_models.flux())
    model.add_adapter(
        LoraConfig(r=RANK, lora_alpha=10, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(model)
    about = model.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=about
    )
    given = tiny_models.inputs(2)
    expected = tiny_models.ask_diffusers(model, given)
    [path] = tmp_path.glob("*.safetensors")
    assert (
        tiny_models.relative_error(
            weight_files.velocity(weight_files.load(base, loras=[(path, 1.0)])), expected
        )
        < 1e-5
    )


def test_a_model_made_by_a_difference(tmp_path, weights, monkeypatch):
    """A guidance-distilled file, a difference in scaled 8-bit floats, and the guidance folded into a bias."""
    base = weight_files.save(weights, tmp_path / "transformer.safetensors")
    chosen = pairs(weights, MODULES)
    file, _ = weight_files.scaled_fp8(file_of(chosen, lambda m: m, None, "lora_A", "lora_B"))
    bias = torch.randn(32) * 0.1
    file |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "time_in.out_layer.lora_B.bias": bias}
    weight_files.save(file, tmp_path / "difference.safetensors")
    own = (tmp_path / "difference.safetensors", 1.0)
    changes = {"lora_filename": own[0].name, "base_params": tiny_models.PARAMS}
    schnell = weight_files.replace(tiny_models.PARAMS, guidance_embed=False)
    model = weight_files.load(base, schnell, own_lora=own, **changes)

    difference = open_checkpoint(tmp_path / "difference.safetensors").tensors
    read = {name: weight.read() for name, weight in difference.items()}
    again = {m: (read[f"{m}.lora_A.weight"], read[f"{m}.lora_B.weight"]) for m in MODULES}
    expected = added(weights, again, 1.0)
    own = tiny_models.flux()
    folded = own.guidance_in(timestep_embedding(torch.tensor([3.5]), 256))[0]
    expected["time_in.out_layer.bias"] = weights["time_in.out_layer.bias"] + bias + folded
    expected = {name: x for name, x in expected.items() if "guidance_in" not in name}
    assert close(model, expected, schnell)
    assert not model.params.guidance_embed
    assert model.state_dict().keys() == expected.keys()

    # One file that is the model already needs no difference.
    merged = weight_files.save(expected, tmp_path / "merged.safetensors")
    assert close(weight_files.load(merged, schnell, **changes), expected, schnell)


def refused(tmp_path, base, file, message, **metadata):
    path = weight_files.save(file, tmp_path / "lora.safetensors", **metadata)
    with pytest.raises(InputError, match=message) as error:
        weight_files.load(base, loras=[(path, 1.0)])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_tensors_that_nothing_takes_are_listed(tmp_path, weights, base):
    file = file_of(pairs(weights), lambda m: "lora_unet_" + m.replace(".", "_"), ALPHA)
    file |= file_of({f"input_blocks.{i}": (torch.zeros(2, 4), torch.zeros(4, 2)) for i in range(6)}, str)
    refused(tmp_path, base, file, r"no part of this model: input_blocks\.0, .* and 2 more")


def test_a_file_that_is_a_whole_model(tmp_path, weights, base):
    refused(tmp_path, base, weights, r"a FLUX.1 transformer \(give it as weights\); expected a LoRA")


@pytest.mark.parametrize(
    ("module", "model"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k", "Stable Diffusion"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k", "Stable Diffusion"),
        ("diffusion_model.blocks.0.cross_attn.k", "Wan"),
        ("transformer.transformer_blocks.0.img_mlp.net.2", "Qwen-Image"),
    ],
)
def test_a_lora_for_another_model(tmp_path, base, module, model):
    file = file_of({module: (torch.zeros(2, 4), torch.zeros(4, 2))}, str)
    refused(tmp_path, base, file, f"no part of this model: .*; it is a LoRA for {model}, take one for FLUX.1")


def test_a_lora_that_says_what_it_is_for(tmp_path, base):
    file = file_of({"some.module": (torch.zeros(2, 4), torch.zeros(4, 2))}, str)
    expected = "or of a form not known here; it says that it is for 'some-model-v1'"
    refused(tmp_path, base, file, expected, ss_base_model_version="some-model-v1")


def test_a_lora_of_another_size(tmp_path, base):
    file = {"img_in.lora_A.weight": torch.zeros(4, 128), "img_in.lora_B.weight": torch.zeros(32, 4)}
    refused(tmp_path, base, file, r"for img_in it has down \(4, 128\), up \(32, 4\), .* 32 x 64 \(a")
    file = {"img_in.lora_A.weight": torch.zeros(4, 64)}
    refused(tmp_path, base, file, r"for img_in it has down \(4, 64\)")


def test_an_empty_file(tmp_path, base):
    refused(tmp_path, base, {}, "no part of this model: none at all")


def test_a_broken_header(tmp_path, weights, base):
    file = file_of(pairs(weights, ["img_in"]), lambda m: m)
    refused(tmp_path, base, file, "JSON is broken", lora_adapter_metadata="{")


def test_loras_in_settings_have_files_and_weights():
    settings = check_settings(ModelSettings, {"lora": ["a", {"file": "b", "weight": 0.8}]})
    assert [(entry.file, entry.weight) for entry in settings.lora] == [("a", 1.0), ("b", 0.8)]
    assert check_settings(ModelSettings, json.loads(json.dumps(settings.to_json()))) == settings
    assert check_settings(ModelSettings, {"lora": "a"}).lora == settings.lora[:1]
    for wrong in ([{"weight": 1.0}], [{"file": "a", "strength": 1.0}], [7], 7):
        with pytest.raises(InputError, match="lora"):
            check_settings(ModelSettings, {"lora": wrong})


def test_a_scan_with_a_lora_is_another_checkpoints(tmp_path):
    module = "double_blocks.0.img_attn.proj"
    width = configs["flux-nano"].params.hidden_size
    chosen = pairs({f"{module}.weight": torch.zeros(width, width)}, [module])
    path = weight_files.save(file_of(chosen, lambda m: m), tmp_path / "lora")

    def checkpoint(*loras):
        return checkpoint_of(ModelSettings(lora=[{"file": str(path), "weight": weight} for weight in loras]))

    found = [checkpoint(), checkpoint(1.0), checkpoint(0.5), checkpoint(1.0, 0.5)]
    assert None not in found
    assert len(set(found)) == 4
    assert checkpoint(1.0) == found[1]


def test_the_module_names_of_a_file(tmp_path):
    path = weight_files.save(
        {"a.lora_A.default.weight": torch.zeros(1, 1), "a.alpha": torch.ones(())}, tmp_path / "lora"
    )
    assert {module: set(fields) for module, fields in read_lora(open_checkpoint(path)).modules.items()} == {
        "a": {"down", "alpha"}
    }
