"""Weights in 8 or 4 bits, expanded layer by layer while the net computes: a half or a quarter of the memory.

Plain torch, so that it runs wherever the net does and its weights move and stream as any others do.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = {"none": 16, "8bit": 8, "4bit": 4, "fp8": 8}
GROUP = 64  # weights that share a scale and a minimum in 4 bits, at most


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are kept in 8 or 4 bits; it computes in the dtype it was made from.

    8 bits: one scale for each output channel, weight = scale * q with q in -127..127. 4 bits: a scale and a
    minimum for each group of 64 inputs (fewer where 128 does not divide the inputs), weight = minimum + scale
    * q with q in 0..15: 4.5 bits a weight with numbers of 16 bits. Two halves of a row share its bytes.

    Raises:
        ValueError: bits that are neither 8 nor 4.
    """

    def __init__(self, linear: nn.Linear, bits: int, device: torch.device | str | None = None):
        super().__init__()
        if bits not in (8, 4):
            raise ValueError(f"Got {bits} bits, expected 8 or 4")
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        weight = linear.weight.detach().to(device or linear.weight.device)
        packed, scale, minimum = (_pack_8 if bits == 8 else _pack_4)(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(weight.device))

    @property
    def weight(self) -> Tensor:
        """All weights, expanded, "out in"."""
        return self._expand(slice(None))

    def _expand(self, rows: slice) -> Tensor:
        packed, scale = self.packed[rows], self.scale[rows]
        if self.bits == 8:
            return packed * scale
        halves = zip(self.minimum[rows].chunk(2, dim=1), (packed & 15, packed >> 4), scale.chunk(2, dim=1))
        return torch.cat([torch.addcmul(*parts) for parts in halves], dim=1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def project(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Only the output channels start..stop."""
        rows = slice(start, stop)
        return F.linear(x, self._expand(rows), None if self.bias is None else self.bias[rows])


def _pack_8(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    scale = (weight.float().abs().amax(dim=1, keepdim=True) / 127).to(weight.dtype)
    q = weight.float() / _nonzero(scale)
    return q.round().clamp(-127, 127).to(torch.int8), scale, None


def _pack_4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    grouped = weight.float().view(rows, -1, group_size(columns))
    minimum = grouped.amin(dim=2, keepdim=True).to(weight.dtype)
    scale = ((grouped.amax(dim=2, keepdim=True) - minimum) / 15).to(weight.dtype)
    q = (grouped - minimum) / _nonzero(scale)
    low, high = q.round().clamp(0, 15).to(torch.uint8).chunk(2, dim=1)
    return low | high << 4, scale, minimum


def _nonzero(scale: Tensor) -> Tensor:
    """Where all weights of a row or a group are equal, their scale is zero."""
    return scale.float().clamp(min=torch.finfo(scale.dtype).tiny)


def group_size(columns: int) -> int:
    """Inputs that share a scale in 4 bits: the halves of a row must hold whole groups."""
    return math.gcd(columns // 2, GROUP)


def quantized_bytes(shape: tuple[int, int], bits: int, itemsize: int) -> int:
    """Bytes of a matrix "out in" once quantised, its scales in numbers of `itemsize` bytes."""
    weights = shape[0] * shape[1]
    return weights * bits // 8 + itemsize * (shape[0] if bits == 8 else 2 * weights // group_size(shape[1]))


def quantize_linears(
    modules: Iterable[nn.Module],
    bits: int,
    device: torch.device | str | None = None,
    home: torch.device | str | None = None,
) -> None:
    """Replaces every linear layer inside the modules, one after the other, so that memory holds one of them.

    Args:
        device: where each is worked out; None: where it is.
        home: where each is kept then; None: where it was worked out.
    """
    for module in modules:
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, QuantizedLinear(child, bits, device).to(home))
