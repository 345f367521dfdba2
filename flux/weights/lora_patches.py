"""Changes of LoRA files, applied to a model.

A change is merged into plain weights, in float32. Beside weights that stay packed, low-rank changes are kept
as a separate branch; any other change is merged into the expanded matrix.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import InputError
from flux.modules.linear import LowRankLinear, PackedLinear
from flux.modules.norms import RMSNorm
from flux.weights.lora_formats import (
    Difference,
    DoRA,
    Factor,
    LoHa,
    LoKr,
    LoraFields,
    LoraPlace,
    LowRank,
    Replacement,
    Sum,
    WeightChange,
    read_finite,
)
from flux.weights.lora_rotations import InputRotation, OutputRotation

BIASES = ("bias", "diff_b")
NO_MATRIX = {"alpha", *BIASES}

# ---- from a file's tensors to a format


def change_in(fields: LoraFields, config: Mapping[str, Any]) -> WeightChange | None:
    """The change to the weight that a file's tensors for a module make up; None if they make up none.

    Args:
        fields: The tensors.
        config: PEFT's configuration, as far as the file has one.
    """
    roles = fields.keys() - NO_MATRIX
    for lengths, scales_direction in (("magnitude", True), ("dora_scale", False)):
        if lengths in roles:
            rest = {role: tensor for role, tensor in fields.items() if role != lengths}
            direction = change_in(rest, config)
            if not isinstance(direction, Sum):
                return None
            return DoRA(direction, fields[lengths], scales_direction)
    if "set" in roles and roles <= {"set", "diff"}:
        return Replacement(fields["set"])
    if roles == {"diff"}:
        return Difference(fields["diff"])
    if roles == {"down", "up"}:
        return LowRank(fields["down"], fields["up"])
    if "oft_R" in roles and roles <= {"oft_R", "scaled_oft"}:
        terms = int(config.get("num_cayley_neumann_terms", 5))
        return InputRotation(
            fields["oft_R"],
            terms if config.get("use_cayley_neumann", True) else None,
            float(config.get("eps", 6e-5)) if config.get("coft") else None,
            "scaled_oft" in roles,
        )
    stacks = sorted((role for role in roles if role.startswith("oft_blocks")), key=_number)
    if stacks and roles <= {*stacks, "rescale"}:
        return OutputRotation(
            tuple(fields[role] for role in stacks), fields.get("alpha"), fields.get("rescale")
        )
    for prefix, kind in (("lokr", LoKr), ("hada", LoHa)):
        if roles and all(role.startswith(prefix) for role in roles):
            return kind(*(Factor.named(f"{prefix}_w{number}", fields) for number in (1, 2)))
    return None


def _number(role: str) -> int:
    """The number after the dot: 2 for "oft_blocks.2"; 0 if there is none."""
    return int(role.partition(".")[2] or 0)


# ---- one change to one module


@dataclass(frozen=True)
class Patch:
    """A change to one place of a model.

    Attributes:
        place: The rows that are changed.
        change: The change to the weight, if any.
        biases: The file's changes to the bias, by role.
        strength: The strength that the user gave the file.
        scale: Alpha / rank, or 1 for changes without.
        name: The module's name in the file.
    """

    place: LoraPlace
    change: WeightChange | None
    biases: LoraFields
    strength: float = 1.0
    scale: float = 1.0
    name: str = ""

    def bias(self, device: torch.device) -> Tensor:
        """Read the change to the bias, "out", in float32; zero if there is none."""
        factors = {"bias": self.strength * self.scale, "diff_b": self.strength}
        total = torch.zeros(self.place.rows, device=device)
        for name in BIASES:
            if name in self.biases:
                total += read_finite(self.biases[name], device).flatten() * factors[name]
        return self.place.in_order(total)


def check_fields(path: Path, place: LoraPlace, fields: LoraFields, change: WeightChange | None) -> None:
    """Check that a file's tensors for a module are complete and of its size. Reads none of them.

    Args:
        path: The file.
        place: What it changes.
        fields: The tensors.
        change: What they make up, see `change_in`.

    Raises:
        InputError: They are not.
    """
    if change is not None:
        fits = change.fits(place.shape)
    else:
        has_bias = any(name in fields for name in BIASES)
        fits = has_bias and place.columns is not None and fields.keys() <= NO_MATRIX
    sizes = {name: math.prod(tensor.shape) for name, tensor in fields.items()}
    biases_fit = all(sizes.get(name, place.rows) == place.rows for name in BIASES)
    if fits and biases_fit and sizes.get("alpha", 1) == 1:
        return
    found = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(fields.items()))
    hint = ""
    if place.module == "img_in":
        hint = " (a LoRA with more input channels needs its model, such as flux-dev-canny-lora)"
    if any(name.startswith("oft_blocks") for name in fields):
        hint = " (blocks must add up to all rows; a fused module has oft_blocks.0, oft_blocks.1, ...)"
    raise InputError(
        f"Got {path}, a difference for another model: for {place.module} it has {found}, expected "
        f"one of {place.rows} x {place.columns}{hint}"
    )


# ---- applying changes


def apply_patches(model: nn.Module, patches: Iterable[Patch], dtype: torch.dtype) -> None:
    """Apply changes to a model, in place.

    Args:
        model: The model, its weights loaded.
        patches: The changes, see `flux.weights.lora.match_patches`.
        dtype: What the model computes in.
    """
    for name, group in _by_module(patches).items():
        module, last = model.get_submodule(name), group[-1]
        if isinstance(module, RMSNorm) and last.change is not None:
            scale = last.change.changed(module.scale, last.place, last.strength, last.scale)
            module.scale = _parameter(scale, dtype)
        elif isinstance(module, nn.Linear | PackedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _patched(module, group, dtype))


def ranks_beside(patches: Iterable[Patch]) -> dict[str, int | None]:
    """Find the rank of the branch that changes put beside each packed weight, for the estimate of memory.

    Returns:
        The rank of the branch beside the weight. None if the weight is expanded, with the changes in it.
    """
    ranks: dict[str, int | None] = {}
    for name, group in _by_module(patches).items():
        changes = [patch.change for patch in group if patch.change is not None]
        low_rank = [change.rank for change in changes if isinstance(change, LowRank)]
        if changes:
            ranks[name] = sum(low_rank) if len(low_rank) == len(changes) else None
    return ranks


def _by_module(patches: Iterable[Patch]) -> dict[str, list[Patch]]:
    groups: dict[str, list[Patch]] = {}
    for patch in patches:
        groups.setdefault(patch.place.module, []).append(patch)
    return groups


def _parameter(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(x.to(dtype), requires_grad=False)


def _patched(
    linear: nn.Linear | PackedLinear, patches: Sequence[Patch], dtype: torch.dtype
) -> nn.Linear | PackedLinear | LowRankLinear:
    """The layer with these changes in it or beside it."""
    changes = [(patch, patch.change) for patch in patches if patch.change is not None]
    low_rank = [(patch, change) for patch, change in changes if isinstance(change, LowRank)]
    biases = [patch for patch in patches if patch.biases]
    if isinstance(linear, PackedLinear) and len(low_rank) == len(changes):
        _add_to_bias(linear, biases, dtype)
        return _beside(linear, low_rank, dtype) if low_rank else linear
    merged = _merged(linear, changes, dtype) if changes else linear
    _add_to_bias(merged, biases, dtype)
    return merged


def _add_to_bias(linear: nn.Linear | PackedLinear, patches: Sequence[Patch], dtype: torch.dtype) -> None:
    device = next(linear.parameters()).device
    rows = linear.packed.shape[0] if isinstance(linear, PackedLinear) else linear.out_features
    for patch in patches:
        bias = torch.zeros(rows, device=device) if linear.bias is None else linear.bias.float()
        bias[patch.place.start : patch.place.stop] += patch.bias(device)
        linear.bias = _parameter(bias, dtype)


def _merged(
    linear: nn.Linear | PackedLinear, changes: Sequence[tuple[Patch, WeightChange]], dtype: torch.dtype
) -> nn.Linear:
    """A plain layer with the changes in it."""
    weight = linear.weight.float()
    for patch, change in changes:
        place = patch.place
        rows, columns = slice(place.start, place.stop), slice(place.columns)
        weight[rows, columns] = change.changed(weight[rows, columns], place, patch.strength, patch.scale)
    merged = nn.Linear(1, 1, bias=False, device="meta")
    merged.out_features, merged.in_features = weight.shape
    merged.weight = _parameter(weight, dtype)
    merged.register_parameter("bias", linear.bias)
    return merged


def _beside(
    linear: PackedLinear, changes: Sequence[tuple[Patch, LowRank]], dtype: torch.dtype
) -> LowRankLinear:
    """The layer and all its low-rank changes as one: downs stacked, ups side by side."""
    device = linear.packed.device
    downs, ups = [], []
    for patch, change in changes:
        down, up = change.factors(patch.place, patch.strength * patch.scale, device)
        rows = torch.zeros(linear.packed.shape[0], up.shape[1], device=device)
        rows[patch.place.start : patch.place.stop] = up
        downs.append(F.pad(down, (0, linear.in_features - down.shape[1])))
        ups.append(rows)
    return LowRankLinear(linear, torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype))
