"""Formats in which LoRA files store a change to a module's weight.

Most add a matrix to it: LoRA, LoKr, LoHa, whole differences. DoRA then brings each row or column to a stored
length. Rotations are in `flux.weights.lora_rotations`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flux.weights.headers import short_name
from flux.weights.numbers import FiniteCheck
from flux.weights.scales import ScaledTensor

LoraFields = Mapping[str, ScaledTensor]
"""A file's tensors for one module by their role, "down", "up", "alpha", "lokr_w1", ..."""


@dataclass(frozen=True)
class LoraPlace:
    """Rows of a module's weight.

    Attributes:
        module: The module's name in our model.
        start: The first row.
        stop: The row after the last one.
        columns: The matrix's columns that are changed, the first ones; None for the vector of a norm.
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
        """A file's rows in our order, or ours in the file's."""
        return torch.cat(x.chunk(2)[::-1]) if self.swapped else x


class WeightChange(ABC):
    """One format of a change to a module's weight."""

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by; None for formats without."""
        return None

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it changes a weight of that shape. Reads no tensor."""

    @abstractmethod
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        """Read the change and apply it.

        Args:
            rows: The rows to change, "out in" in float32 and in our order.
            place: Where they are.
            strength: The strength that the user gave the file.
            scale: Alpha / rank.

        Returns:
            The changed rows, likewise.
        """


# ---- sums


class Sum(WeightChange):
    """A format that adds a matrix to the weight."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the matrix; None if its tensors do not fit together."""

    @override
    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.shape == shape and len(shape) == 2

    @abstractmethod
    def _values(self, device: torch.device) -> Tensor:
        """The matrix in float32, rows in the file's order."""

    def matrix(self, place: LoraPlace, factor: float, device: torch.device) -> Tensor:
        """Read the matrix in float32, "out in", with rows in our order and times `factor`."""
        return place.in_order(self._values(device)) * factor

    @override
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        return rows + self.matrix(place, strength * scale, rows.device)


@dataclass(frozen=True)
class Difference(Sum):
    """The whole difference ("diff")."""

    stored: ScaledTensor

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def _values(self, device: torch.device) -> Tensor:
        return read_finite(self.stored, device)


@dataclass(frozen=True)
class LowRank(Sum):
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
        return read_finite(self.down, device), place.in_order(read_finite(self.up, device)) * factor

    def _values(self, device: torch.device) -> Tensor:
        return read_finite(self.up, device) @ read_finite(self.down, device)

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
            return read_finite(self.whole, device)
        if self.a is None or self.b is None:
            raise ValueError("the factor is incomplete")  # its shape is None, hence it was refused
        return read_finite(self.a, device) @ read_finite(self.b, device)


@dataclass(frozen=True)
class LoKr(Sum):
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


# ---- other formats


@dataclass(frozen=True)
class Replacement(WeightChange):
    """Values that replace the model's own, whatever the strength ("set_weight", a norm's "scale")."""

    stored: ScaledTensor

    @override
    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.stored.shape == shape

    @override
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        return place.in_order(read_finite(self.stored, rows.device))


@dataclass(frozen=True)
class DoRA(WeightChange):
    """DoRA (arXiv 2402.09353): a sum of which each row, or each column, is brought to a stored length.

    Attributes:
        direction: The sum.
        lengths: The lengths: "out" or "out 1" for rows, "1 in" for columns.
        scales_direction: What a strength other than 1 means. Either it multiplies what is added to the weight
            before lengths are set, as PEFT has it, or it leads that part of the way from the model's weight
            to the changed one.
    """

    direction: Sum
    lengths: ScaledTensor
    scales_direction: bool

    @property
    @override
    def rank(self) -> int | None:
        return self.direction.rank

    @override
    def fits(self, shape: tuple[int, ...]) -> bool:
        rows, columns = shape if len(shape) == 2 else (0, 0)
        return self.direction.fits(shape) and self.lengths.shape in ((rows,), (rows, 1), (1, columns))

    @override
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        inner = strength if self.scales_direction else 1.0
        summed = self.direction.changed(rows, place, inner, scale)
        lengths, axis = read_finite(self.lengths, rows.device), 0
        if self.lengths.shape[0] == len(rows):
            lengths, axis = place.in_order(lengths.reshape(-1, 1)), 1
        found = torch.linalg.vector_norm(summed, dim=axis, keepdim=True)
        whole = summed * (lengths / found.clamp(min=torch.finfo(found.dtype).eps))
        return whole if self.scales_direction else torch.lerp(rows, whole, strength)


def read_finite(tensor: ScaledTensor, device: torch.device) -> Tensor:
    """Read a tensor in float32.

    Raises:
        InputError: It holds numbers that are NaN or infinite.
    """
    values, check = tensor.read(device).float(), FiniteCheck()
    check.add(short_name(tensor.stored.name), tensor.stored.path, values)
    check.finish(torch.float32)
    return values


def _product_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    return (left[0], right[1]) if len(left) == len(right) == 2 and left[1] == right[0] else None
