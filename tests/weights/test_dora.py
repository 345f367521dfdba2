"""DoRA: PEFT's own merged weights, and the definition for the files of other trainers."""

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import ALPHA, RANK, STRENGTH, close, file_of, pairs
from torch import Tensor

from flux.errors import InputError

MODULES = (
    "img_in",
    "double_blocks.0.img_attn.qkv",
    "single_blocks.1.linear1",
    "final_layer.adaLN_modulation.1",
)


def decomposed(weight: Tensor, difference: Tensor, lengths: Tensor) -> Tensor:
    """The sum, each row or column as long as `lengths`, "out 1" or "1 in", says."""
    whole = weight + difference
    return lengths * whole / whole.square().sum(dim=1 if lengths.shape[1] == 1 else 0, keepdim=True).sqrt()


@pytest.mark.parametrize("strength", [1.0, STRENGTH, 0.0])
def test_a_file_that_peft_writes(tmp_path, base, strength):
    """The rows of its magnitudes are those of diffusers' modules, of which several make up one of ours."""
    from peft import LoraConfig, get_peft_model

    model = tiny_models.diffusers_transformer(tiny_models.flux())
    targets = ["to_q", "to_v", "proj_mlp", "proj_out", "norm_out.linear"]
    config = LoraConfig(r=RANK, lora_alpha=6, use_dora=True, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape)
    adapted.save_pretrained(tmp_path)
    for module in adapted.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(strength)
    expected = adapted.merge_and_unload().state_dict()
    loaded = weight_files.load(base, loras=[(tmp_path, strength)]).state_dict()
    merged = tiny_models.to_diffusers_transformer(loaded, 32)
    for name, x in merged.items():
        assert tiny_models.relative_error(x, expected[name]) < 1e-5, name
    own = tiny_models.to_diffusers_transformer(tiny_models.flux().state_dict(), 32)
    changed = {name for name, x in merged.items() if not torch.allclose(x, own[name])}
    assert len(changed) == 3 * 2 + 4 * 4 + 2


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("strength", [1.0, STRENGTH, 0.0])
def test_dora_scale_of_either_axis(tmp_path, weights, base, axis, strength):
    """As LyCORIS and OneTrainer write it: a strength leads a part of the way."""
    chosen, expected = pairs(weights, MODULES), dict(weights)
    file = file_of(chosen, lambda m: "lora_unet_" + m.replace(".", "_"), ALPHA)
    for module, (down, up) in chosen.items():
        weight = weights[f"{module}.weight"]
        lengths = torch.rand((len(weight), 1) if axis == "rows" else (1, weight.shape[1])) + 0.5
        file[f"lora_unet_{module.replace('.', '_')}.dora_scale"] = lengths
        whole = decomposed(weight, ALPHA / RANK * up @ down, lengths)
        expected[f"{module}.weight"] = weight + strength * (whole - weight)
    path = weight_files.save(file, tmp_path / "lora")
    assert close(weight_files.load(base, loras=[(path, strength)]), expected)


def test_rows_in_the_order_of_diffusers(tmp_path, weights, base):
    """Its last modulation has the two halves of the rows swapped."""
    name = "final_layer.adaLN_modulation.1.weight"
    [pair] = pairs(weights, [name.removesuffix(".weight")]).values()
    lengths = torch.rand(len(weights[name]), 1) + 0.5
    file = {
        "transformer.norm_out.linear.lora_A.weight": pair[0],
        "transformer.norm_out.linear.lora_B.weight": pair[1],
    }
    path = weight_files.save({**file, "transformer.norm_out.linear.dora_scale": lengths}, tmp_path / "lora")
    up, lengths = (torch.cat(x.chunk(2)[::-1]) for x in (pair[1], lengths))
    expected = {**weights, name: decomposed(weights[name], up @ pair[0], lengths)}
    assert close(weight_files.load(base, loras=[(path, 1.0)]), expected)


def test_a_dora_of_a_kronecker_product(tmp_path, weights, base):
    name = "double_blocks.1.img_attn.proj.weight"
    first, second, lengths = torch.randn(4, 4), torch.randn(8, 8) * 0.1, torch.rand(32, 1) + 0.5
    parts = {"lokr_w1": first, "lokr_w2": second, "dora_scale": lengths}
    file = {f"lycoris_double_blocks_1_img_attn_proj.{role}": x for role, x in parts.items()}
    expected = {**weights, name: decomposed(weights[name], torch.kron(first, second), lengths)}
    assert close(weight_files.load(base, loras=[(weight_files.save(file, tmp_path / "lora"), 1.0)]), expected)


def test_a_lora_before_and_after_it(tmp_path, weights, base):
    """Files are applied in their order: lengths are those of the weight that a DoRA finds."""
    name = "double_blocks.0.img_attn.proj.weight"
    module = name.removesuffix(".weight")
    files, expected = [], weights[name]
    for seed, lengths in enumerate((None, torch.rand(32, 1) + 0.5, None)):
        chosen = pairs(weights, [module], seed=seed)
        file = file_of(chosen, lambda m: m)
        difference = chosen[module][1] @ chosen[module][0]
        if lengths is None:
            expected = expected + difference
        else:
            file[f"{module}.dora_scale"], expected = lengths, decomposed(expected, difference, lengths)
        files.append((weight_files.save(file, tmp_path / str(seed)), 1.0))
    assert close(weight_files.load(base, loras=files), {**weights, name: expected})


@pytest.mark.parametrize("form", ["Q4_K", "fp8"])
def test_over_packed_weights(tmp_path, form):
    """Merged into the expanded matrix."""
    own, module = weight_files.wide().state_dict(), "single_blocks.0.linear1"
    if form == "fp8":
        file, held = weight_files.scaled_fp8(own)
        path = weight_files.save(file, tmp_path / "m")
    else:
        path = tmp_path / "m.gguf"
        held = weight_files.save_gguf(own, path, form)
    weight = held[f"{module}.weight"]
    down, up = pairs(own, [module])[module]
    lengths = torch.rand(len(weight), 1) + 0.5
    lora = {**file_of({module: (down, up)}, lambda m: m), f"{module}.dora_scale": lengths}
    loras = [(weight_files.save(lora, tmp_path / "lora"), 1.0)]
    model = weight_files.load(path, weight_files.WIDE, keep_8bit=True, loras=loras)
    expected = {**held, f"{module}.weight": decomposed(weight, up @ down, lengths)}
    assert close(model, expected, weight_files.WIDE)


@pytest.mark.parametrize("shape", [(31, 1), (1, 31), (32, 2), (2,), (4, 8)])
def test_lengths_of_another_size(tmp_path, weights, base, shape):
    file = file_of(pairs(weights, ["txt_in"]), lambda m: m) | {"txt_in.dora_scale": torch.ones(shape)}
    path = weight_files.save(file, tmp_path / "lora")
    with pytest.raises(InputError, match=r"for another model: for txt_in it has dora_scale \(.*32 x 20"):
        weight_files.load(base, loras=[(path, 1.0)])
