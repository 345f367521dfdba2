"""Formats in which LoRA files store a change to a module, and how each is applied to a model.

A change is merged into plain weights, in float32. Beside weights that stay packed, low-rank changes are kept
as a separate branch; any other change is merged into the expanded matrix.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from flux.errors import InputError
from flux.modules.linear import LowRankLinear, PackedLinear
from flux.modules.norms import RMSNorm
from flux.weights.numbers import FiniteCheck
from flux.weights.scales import ScaledTensor

LoraFields = Mapping[str, ScaledTensor]
"""A file's tensors for one module by their role, "down", "up", "alpha", "lokr_w1", ..."""
BIASES = ("bias", "diff_b")
NO_MATRIX = {"alpha", *BIASES}


@dataclass(frozen=True)
class LoraPlace:
    """Rows of a module's weight.

    Attributes:
        module: The module's name in our model.
        start: The first row.
        stop: The row after the last one.
        columns: The matrix's columns; None for the vector of a norm.
        swapped: Whether files have the two halves of the rows in the other order.
    """

    module: str
    start: int
    stop: int
    columns: int | None
    swapped: bool = False

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of these rows."""
        return (self.rows,) if self.columns is None else (self.rows, self.columns)

    def in_order(self, x: Tensor) -> Tensor:
        """A file's rows in our order."""
        return torch.cat(x.chunk(2)[::-1]) if self.swapped else x


# ---- the formats


class WeightChange(ABC):
    """One format of a change to a module's weight."""

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for formats without."""
        return None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the weight that it changes; None if its tensors do not fit together."""

    @abstractmethod
    def _values(self, device: torch.device) -> Tensor:
        """The change in float32, rows in the file's order."""

    def matrix(self, place: LoraPlace, factor: float, device: torch.device) -> Tensor:
        """Read the change in float32, "out in", with rows in our order and times `factor`."""
        return place.in_order(self._values(device)) * factor


@dataclass(frozen=True)
class Difference(WeightChange):
    """The whole difference ("diff")."""

    stored: ScaledTensor

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def _values(self, device: torch.device) -> Tensor:
        return _read(self.stored, device)


class Replacement(Difference):
    """Values that replace the model's own, whatever the strength ("set_weight", a norm's "scale")."""


@dataclass(frozen=True)
class LowRank(WeightChange):
    """LoRA (arXiv 2106.09685): up @ down."""

    down: ScaledTensor
    up: ScaledTensor

    @property
    @override
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    @override
    def shape(self) -> tuple[int, ...] | None:
        return _product_shape(self.up.shape, self.down.shape)

    def factors(self, place: LoraPlace, factor: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Read down, "rank in", and up, "out rank", the latter with rows in our order and times `factor`."""
        return _read(self.down, device), place.in_order(_read(self.up, device)) * factor

    def _values(self, device: torch.device) -> Tensor:
        return _read(self.up, device) @ _read(self.down, device)

    @override
    def matrix(self, place: LoraPlace, factor: float, device: torch.device) -> Tensor:
        down, up = self.factors(place, factor, device)  # cheaper than scaling the product
        return up @ down


@dataclass(frozen=True)
class Factor:
    """One of two factors of a LyCORIS change: stored as one matrix, or as a product a @ b."""

    whole: ScaledTensor | None
    a: ScaledTensor | None
    b: ScaledTensor | None

    @classmethod
    def named(cls, name: str, fields: LoraFields) -> "Factor":
        """Take the factor of that name from a file's tensors for a module."""
        return cls(fields.get(name), fields.get(f"{name}_a"), fields.get(f"{name}_b"))

    @property
    def rank(self) -> int | None:
        """The inner size of the product, if there is one."""
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The factor's shape; None if it is incomplete."""
        if self.whole is not None:
            return self.whole.shape if len(self.whole.shape) == 2 else None
        return None if self.a is None or self.b is None else _product_shape(self.a.shape, self.b.shape)

    def read(self, device: torch.device) -> Tensor:
        """Read the factor in float32."""
        if self.whole is not None:
            return _read(self.whole, device)
        if self.a is None or self.b is None:
            raise ValueError("the factor is incomplete")  # its shape is None, hence it was refused
        return _read(self.a, device) @ _read(self.b, device)


@dataclass(frozen=True)
class LoKr(WeightChange):
    """LyCORIS LoKr (arXiv 2212.10650): the Kronecker product of two factors."""

    first: Factor
    second: Factor

    @property
    @override
    def rank(self) -> int | None:
        return self.second.rank if self.first.rank is None else self.first.rank

    @property
    @override
    def shape(self) -> tuple[int, ...] | None:
        first, second = self.first.shape, self.second.shape
        return None if first is None or second is None else (first[0] * second[0], first[1] * second[1])

    def _values(self, device: torch.device) -> Tensor:
        return torch.kron(self.first.read(device), self.second.read(device))


class LoHa(LoKr):
    """LyCORIS LoHa (arXiv 2108.06098): the elementwise product of two factors."""

    @property
    @override
    def shape(self) -> tuple[int, ...] | None:
        return self.first.shape if self.first.shape == self.second.shape else None

    def _values(self, device: torch.device) -> Tensor:
        return self.first.read(device) * self.second.read(device)


def _read(tensor: ScaledTensor, device: torch.device) -> Tensor:
    values, check = tensor.read(device).float(), FiniteCheck()
    check.add("a tensor", tensor.stored.path, values)
    check.finish(torch.float32)
    return values


def _product_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else None


def change_in(fields: LoraFields) -> WeightChange | None:
    """The change to the weight that these tensors make up; None if they make up none."""
    roles = fields.keys() - NO_MATRIX
    if "set" in roles and roles <= {"set", "diff"}:
        return Replacement(fields["set"])
    if roles == {"diff"}:
        return Difference(fields["diff"])
    if roles == {"down", "up"}:
        return LowRank(fields["down"], fields["up"])
    for prefix, kind in (("lokr", LoKr), ("hada", LoHa)):
        if roles and all(role.startswith(prefix) for role in roles):
            return kind(*(Factor.named(f"{prefix}_w{number}", fields) for number in (1, 2)))
    return None


# ---- one change to one module


@dataclass(frozen=True)
class Patch:
    """A change to one place of a model.

    Attributes:
        place: The rows that are changed.
        change: The change to the weight, if any.
        biases: The file's changes to the bias, by role.
        strength: The strength that the user gave the file.
        factor: That strength times alpha / rank.
    """

    place: LoraPlace
    change: WeightChange | None
    biases: LoraFields
    strength: float = 1.0
    factor: float = 1.0

    def bias(self, device: torch.device) -> Tensor:
        """Read the change to the bias, "out", in float32; zero if there is none."""
        factors = {"bias": self.factor, "diff_b": self.strength}
        total = torch.zeros(self.place.rows, device=device)
        for name in BIASES:
            if name in self.biases:
                total += _read(self.biases[name], device).flatten() * factors[name]
        return self.place.in_order(total)


def check_fields(path: Path, place: LoraPlace, fields: LoraFields) -> None:
    """Check that a file's tensors for a module are complete and of its size. Reads none of them.

    Raises:
        InputError: They are not.
    """
    change, has_bias = change_in(fields), any(name in fields for name in BIASES)
    if change is not None:
        fits = change.shape == place.shape and (place.columns is not None or isinstance(change, Replacement))
    else:
        fits = has_bias and place.columns is not None and fields.keys() <= NO_MATRIX
    sizes = {name: math.prod(tensor.shape) for name, tensor in fields.items()}
    biases_fit = all(sizes.get(name, place.rows) == place.rows for name in BIASES)
    if fits and biases_fit and sizes.get("alpha", 1) == 1:
        return
    found = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(fields.items()))
    hint = ""
    if place.module == "img_in":
        hint = " (one for canny, depth or fill needs more inputs than the models known here have)"
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
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.place.module, []).append(patch)
    for name, group in by_module.items():
        module, last = model.get_submodule(name), group[-1]
        if isinstance(module, RMSNorm) and last.change is not None:
            scale = last.change.matrix(last.place, 1.0, module.scale.device)
            module.scale = _parameter(scale, dtype)
        elif isinstance(module, nn.Linear | PackedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _patched(module, group, dtype))


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
        rows = slice(patch.place.start, patch.place.stop)
        if isinstance(change, Replacement):
            weight[rows] = change.matrix(patch.place, 1.0, weight.device)
        else:
            weight[rows] += change.matrix(patch.place, patch.factor, weight.device)
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
        down, up = change.factors(patch.place, patch.factor, device)
        rows = torch.zeros(linear.packed.shape[0], up.shape[1], device=device)
        rows[patch.place.start : patch.place.stop] = up
        downs.append(down)
        ups.append(rows)
    return LowRankLinear(linear, torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype))
