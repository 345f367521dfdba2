"""LoRA files for tests: random changes, and what they make of a model's weights."""

import math

import torch
from torch import Tensor

from helpers import tiny_models, weight_files

RANK, ALPHA, STRENGTH = 4, 2.0, 0.7

# A few modules of each kind, in the model's own names.
MODULES = (
    "img_in", "time_in.in_layer", "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.qkv",
    "double_blocks.2.txt_attn.proj", "double_blocks.1.img_mod.lin", "double_blocks.0.img_mlp.2",
    "single_blocks.1.linear1", "single_blocks.3.linear2", "single_blocks.0.modulation.lin",
    "final_layer.adaLN_modulation.1", "final_layer.linear",
)  # fmt: skip


def pairs(weights: dict[str, Tensor], modules=MODULES, rank=RANK, seed=0) -> dict[str, tuple[Tensor, Tensor]]:
    """For each module a random down "rank in" and up "out rank"."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        rows, columns = weights[f"{module}.weight"].shape
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        found[module] = down, torch.randn(rows, rank, generator=generator) * 0.3
    return found


def added(weights: dict[str, Tensor], chosen: dict, factor: float) -> dict[str, Tensor]:
    """The weights with up @ down times the factor added."""
    changed = dict(weights)
    for module, (down, up) in chosen.items():
        changed[f"{module}.weight"] = weights[f"{module}.weight"] + factor * (up @ down)
    return changed


def close(model, expected: dict[str, Tensor], params=tiny_models.PARAMS) -> bool:
    """Whether a model gives the velocity of these weights, up to rounding."""
    return (
        tiny_models.relative_error(
            weight_files.velocity(model), weight_files.velocity(weight_files.model_of(expected, params))
        )
        < 2e-6
    )


def assert_alpha_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """The same file in kohya's names, but that alpha has moved into the second factor."""
    assert before.keys() == after.keys()
    for name in before:
        factor = ALPHA / RANK if name.endswith("lora_up.weight") else 1.0
        expected = torch.tensor(float(RANK)) if name.endswith(".alpha") else factor * before[name]
        assert torch.equal(after[name], expected), name


def file_of(chosen: dict, names, alpha: float | None = None, downs="lora_down", ups="lora_up"):
    """The tensors of a LoRA's file. `names` gives each module its name in the file."""
    file = {}
    for module, (down, up) in chosen.items():
        file[f"{names(module)}.{downs}.weight"] = down
        file[f"{names(module)}.{ups}.weight"] = up
        if alpha is not None:
            file[f"{names(module)}.alpha"] = torch.tensor(alpha)
    return file
