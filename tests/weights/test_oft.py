"""OFT: PEFT's own merged weights, and the definition for the files of other trainers."""

import math

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import STRENGTH, close
from torch import Tensor

from flux.errors import InputError

PROJ = "double_blocks.0.img_attn.proj.weight"
NOT_DEFAULT = [
    {"use_cayley_neumann": False},
    {"num_cayley_neumann_terms": 2},
    {"num_cayley_neumann_terms": 3},
    {"num_cayley_neumann_terms": 7},
    {"block_share": True},
    {"coft": True, "eps": 0.5},
]


def rotations(stack: Tensor, limit: float = math.inf) -> Tensor:
    """The Cayley transforms of the skew-symmetric parts, which are at most `limit` long together."""
    skew = stack - stack.mT
    skew = skew * min(1.0, limit / float(skew.norm()))
    unit = torch.eye(stack.shape[-1])
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def rotated(rows: Tensor, stack: Tensor, limit: float = math.inf) -> Tensor:
    """Rows multiplied by the transpose of a matrix with these rotations along its diagonal."""
    return torch.block_diag(*rotations(stack, limit)).T @ rows


@pytest.mark.parametrize("options", [{}, *NOT_DEFAULT], ids=str)
def test_a_file_that_peft_writes(tmp_path, base, options):
    from peft import OFTConfig, get_peft_model

    model = tiny_models.diffusers_transformer(tiny_models.flux())
    targets = ["to_q", "to_v", "proj_mlp", "proj_out", "norm_out.linear"]
    config = OFTConfig(r=0, oft_block_size=8, target_modules=targets, **options)
    adapted = get_peft_model(model, config).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "oft_R" in name:
            parameter.data = torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload().state_dict()
    loaded = weight_files.load(base, loras=[(tmp_path, 1.0)]).state_dict()
    merged = tiny_models.to_diffusers_transformer(loaded, 32)
    for name, x in merged.items():
        assert tiny_models.relative_error(x, expected[name]) < 1e-5, name
    own = tiny_models.to_diffusers_transformer(tiny_models.flux().state_dict(), 32)
    assert sum(not torch.allclose(x, own[name]) for name, x in merged.items()) == 3 * 2 + 4 * 4 + 2


def test_a_strength_leads_a_part_of_the_way(tmp_path, weights, base):
    """PEFT knows no other strength than 1; OneTrainer divides by the root of the numbers in a block."""
    upper = torch.randn(4, 28)
    module = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    file = {f"{module}.oft_R.weight": upper, f"{module}.oft_R.scaled_oft": torch.tensor(1)}
    path = weight_files.save(file, tmp_path / "lora")
    skew = torch.zeros(4, 8, 8)
    rows, columns = torch.triu_indices(8, 8, 1)
    skew[:, rows, columns] = upper / math.sqrt(28)
    skew = skew - skew.mT
    series = torch.eye(8) + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
    whole = weights[PROJ] @ torch.block_diag(*series).T
    for strength in (1.0, STRENGTH, 0.0):
        expected = {**weights, PROJ: weights[PROJ] + strength * (whole - weights[PROJ])}
        assert close(weight_files.load(base, loras=[(path, strength)]), expected)


@pytest.mark.parametrize("alpha", [1e-3, 0.0, 4.0])
@pytest.mark.parametrize("strength", [1.0, STRENGTH])
def test_kohya(tmp_path, weights, base, alpha, strength):
    """Queries, keys, values and MLP turn apart, each with a constraint of its own."""
    name = "single_blocks.1.linear1"
    weight = weights[f"{name}.weight"]
    parts = weight.split([32, 32, 32, len(weight) - 96])
    stacks = [torch.randn(4, len(part) // 4, len(part) // 4) * 0.05 for part in parts]
    file = {f"oft_unet_single_blocks_1_linear1.oft_blocks.{i}": stack for i, stack in enumerate(stacks)}
    file["oft_unet_single_blocks_1_linear1.alpha"] = torch.tensor(alpha)
    path = weight_files.save(file, tmp_path / "lora")
    whole = torch.cat(
        [
            rotated(part, stack, alpha * len(part) if alpha else math.inf)
            for part, stack in zip(parts, stacks, strict=True)
        ]
    )
    expected = {**weights, f"{name}.weight": weight + strength * (whole - weight)}
    assert close(weight_files.load(base, loras=[(path, strength)]), expected)


@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris(tmp_path, weights, base, rescaled):
    """One stack, factors of the rows, and rows of the last modulation in diffusers' order."""
    name = "final_layer.adaLN_modulation.1.weight"
    stack, factors = torch.randn(8, 8, 8) * 0.1, torch.rand(64, 1) + 0.5
    file = {"lycoris_norm_out_linear.oft_blocks": stack, "lycoris_norm_out_linear.alpha": torch.tensor(0.0)}
    if rescaled:
        file["lycoris_norm_out_linear.rescale"] = factors
    theirs = rotated(torch.cat(weights[name].chunk(2)[::-1]), stack) * (factors if rescaled else 1)
    expected = {**weights, name: torch.cat(theirs.chunk(2)[::-1])}
    path = weight_files.save(file, tmp_path / "lora")
    assert close(weight_files.load(base, loras=[(path, 1.0)]), expected)


@pytest.mark.parametrize("form", ["Q4_K", "fp8"])
def test_over_packed_weights(tmp_path, form):
    """Merged into the expanded matrix."""
    own, module = weight_files.wide().state_dict(), "double_blocks.0.img_attn.proj"
    if form == "fp8":
        file, held = weight_files.scaled_fp8(own)
        path = weight_files.save(file, tmp_path / "m")
    else:
        path = tmp_path / "m.gguf"
        held = weight_files.save_gguf(own, path, form)
    stack = torch.randn(8, 32, 32) * 0.1
    loras = [(weight_files.save({f"{module}.oft_blocks": stack}, tmp_path / "lora"), 1.0)]
    model = weight_files.load(path, weight_files.WIDE, keep_8bit=True, loras=loras)
    expected = {**held, f"{module}.weight": rotated(held[f"{module}.weight"], stack)}
    assert close(model, expected, weight_files.WIDE)


@pytest.mark.parametrize(
    ("role", "shape"),
    [
        ("oft_blocks", (4, 80, 80)),
        ("oft_blocks", (8, 4, 2)),
        ("oft_blocks", (32, 32)),
        ("oft_R.weight", (4, 27)),
        ("oft_R.weight", (3, 28)),
        ("oft_R.weight", (28,)),
        ("oft_R.weight", (4, 0)),
    ],
)
def test_blocks_of_another_size(tmp_path, base, role, shape):
    path = weight_files.save({f"double_blocks.0.img_attn.proj.{role}": torch.zeros(shape)}, tmp_path / "lora")
    with pytest.raises(InputError, match=r"a difference for another model: for .*proj it has oft_.*32 x 32"):
        weight_files.load(base, loras=[(path, 1.0)])


def test_a_configuration_that_cannot_be_read(tmp_path, base):
    file, text = (
        {"img_in.oft_R.weight": torch.zeros(8, 28)},
        '{"transformer.num_cayley_neumann_terms": "many"}',
    )
    path = weight_files.save(file, tmp_path / "lora", lora_adapter_metadata=text)
    with pytest.raises(InputError, match="lora, whose configuration cannot be read"):
        weight_files.load(base, loras=[(path, 1.0)])
