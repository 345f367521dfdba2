"""OFT in LoRA files (arXiv 2306.07280): a module's weight multiplied by rotations of blocks.

PEFT and OneTrainer rotate the inputs, kohya and LyCORIS the outputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from flux.weights.lora_formats import LoraPlace, WeightChange, read_finite
from flux.weights.scales import ScaledTensor


@dataclass(frozen=True)
class InputRotation(WeightChange):
    """OFT as PEFT stores it ("oft_R"): rotations of blocks of the inputs.

    Attributes:
        upper: The upper triangles of skew-symmetric matrices, "blocks size*(size-1)/2". One block stands for
            all if there is one.
        terms: Terms of the Neumann series in place of the Cayley transform. If None, the transform itself.
        limit: Largest norm of all matrices together ("coft"). If None, there is no limit.
        is_scaled: Whether the numbers are to be divided by the root of their count in a block.
    """

    upper: ScaledTensor
    terms: int | None
    limit: float | None
    is_scaled: bool

    @property
    def _size(self) -> int:
        """The size of a block; 0 if there is none with so many numbers."""
        count = self.upper.shape[1] if len(self.upper.shape) == 2 else 0
        size = (1 + math.isqrt(1 + 8 * count)) // 2
        return size if count and size * (size - 1) == 2 * count else 0

    @override
    def fits(self, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or not self._size or shape[1] % self._size:
            return False
        return self.upper.shape[0] in (1, shape[1] // self._size)

    @override
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        upper = read_finite(self.upper, rows.device)
        size, stored = self._size, len(upper)
        if self.is_scaled:
            upper = upper / math.sqrt(upper.shape[1])
        skew = torch.zeros(stored, size, size, device=rows.device)
        row, column = torch.triu_indices(size, size, 1)
        skew[:, row, column] = upper
        skew = skew - skew.mT
        if self.limit is not None:
            norms = skew.norm(dim=(1, 2), keepdim=True)
            skew = skew * (self.limit / math.sqrt(stored) / norms.clamp(min=1e-30)).clamp(max=1)
        # PEFT's series is that of the transform of -skew.
        rotations = _cayley(-skew) if self.terms is None else _neumann(skew, self.terms)
        blocks = rows.unflatten(1, (-1, size))
        whole = torch.einsum("obk,bck->obc", blocks, rotations.expand(blocks.shape[1], -1, -1)).flatten(1)
        return torch.lerp(rows, whole, strength)


@dataclass(frozen=True)
class OutputRotation(WeightChange):
    """OFT as kohya and LyCORIS store it ("oft_blocks"): rotations of blocks of the outputs.

    Attributes:
        stacks: Matrices whose skew-symmetric parts count, "blocks size size". A fused module has one stack
            for each of its parts, in row order.
        alpha: The norm of a stack's skew-symmetric matrices is at most alpha times its rows. If None or 0,
            there is no limit.
        rescale: Factors of the rotated rows, "out 1", if any.
    """

    stacks: tuple[ScaledTensor, ...]
    alpha: ScaledTensor | None
    rescale: ScaledTensor | None

    @override
    def fits(self, shape: tuple[int, ...]) -> bool:
        shapes = [stack.shape for stack in self.stacks]
        if len(shape) != 2 or any(len(stack) != 3 or stack[1] != stack[2] for stack in shapes):
            return False
        factors = shape[0] if self.rescale is None else math.prod(self.rescale.shape)
        return factors == shape[0] == sum(blocks * size for blocks, size, _ in shapes)

    @override
    def changed(self, rows: Tensor, place: LoraPlace, strength: float, scale: float) -> Tensor:
        alpha = 0.0 if self.alpha is None else float(read_finite(self.alpha, rows.device))
        stacks = [read_finite(stack, rows.device) for stack in self.stacks]
        parts = place.in_order(rows).split([len(stack) * stack.shape[1] for stack in stacks])
        turned = torch.cat([_turned(part, stack, alpha) for part, stack in zip(parts, stacks, strict=True)])
        if self.rescale is not None:
            turned = turned * read_finite(self.rescale, rows.device).reshape(-1, 1)
        return torch.lerp(rows, place.in_order(turned), strength)


def _turned(rows: Tensor, stack: Tensor, alpha: float) -> Tensor:
    """Rows after their blocks' rotations."""
    skew = stack - stack.mT
    if alpha > 0:
        skew = skew * (alpha * len(rows) / skew.norm().clamp(min=1e-8)).clamp(max=1)
    blocks = rows.unflatten(0, stack.shape[:2])
    return torch.einsum("bnm,bni->bmi", _cayley(skew), blocks).flatten(0, 1)


def _cayley(skew: Tensor) -> Tensor:
    """The rotations (I + Q) (I - Q)^-1 of skew-symmetric matrices Q, "blocks size size"."""
    unit = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(unit - skew, unit + skew, left=False)


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for the same: I + 2 Q + 2 Q^2 + ... with half the weight on the last term."""
    unit = torch.eye(skew.shape[-1], device=skew.device)
    if terms < 3:
        return unit + 2 * skew * (terms - 1)
    total, power, last = unit + 2 * skew, skew, max(3, terms - 1)
    for degree in range(2, last + 1):
        power = power @ skew
        total = total + power * (1 if degree == last else 2)
    return total
