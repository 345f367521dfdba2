"""Linear layers whose weights stay as a file packs them, those that compute in 8-bit floats, and low-rank
differences beside any linear layer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.modules import gguf_blocks
from flux.modules.ops import E4M3, Rounded, rounded

EIGHT_BIT = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class PackedLinear(nn.Module):
    """A linear layer whose matrix is expanded anew each time it is used.

    Args:
        packed: the matrix as bytes, "out_features bytes".
        kind: of its numbers: one of `flux.modules.gguf_blocks.BLOCKS`, or "F8_E4M3" or "F8_E5M2".
        bias: "out_features" or None.
        scale: of 8-bit floats: a number, or one for each row, "out_features 1".
        dtype: what it computes in.
    """

    def __init__(
        self,
        packed: Tensor,
        kind: str,
        bias: nn.Parameter | None,
        scale: Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix, "out_features in_features"."""
        return self._expand(0, None)

    def _expand(self, start: int, stop: int | None) -> Tensor:
        rows = self.packed[start:stop]
        if self.kind in gguf_blocks.BLOCKS:
            return gguf_blocks.expand(rows, self.kind).to(self.dtype)
        plain = rows.view(EIGHT_BIT[self.kind])
        if self.scale is None:
            return plain.to(self.dtype)
        scale = self.scale[start:stop] if self.scale.ndim else self.scale
        return (plain.float() * scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def project(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Only the output channels start..stop."""
        bias = None if self.bias is None else self.bias[start:stop]
        return F.linear(x, self._expand(start, stop), bias)


class Fp8Linear(nn.Module):
    """A linear layer with weights and activations in e4m3, a scale for each row of either; sums are wider.

    Made of a file's e4m3 numbers, whatever their scales, it keeps them as they are.
    """

    takes_rounded = True

    def __init__(self, linear: nn.Linear | PackedLinear, device: torch.device | str | None = None):
        super().__init__()
        if isinstance(linear, PackedLinear):
            packed = linear.packed.detach().to(device).view(E4M3)
            own = torch.ones(()) if linear.scale is None else linear.scale.detach().float()
            scale = own.to(packed.device).view(-1, 1)
            self.dtype = linear.dtype
        else:
            packed, scale = rounded(linear.weight.detach().to(device))
            self.dtype = linear.weight.dtype
        self.out_features, self.in_features = packed.shape
        self.register_buffer("packed", packed)
        # One for each row, or one for all, "1 1", as the file has it.
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(packed.device))

    @property
    def weight(self) -> Tensor:
        """The matrix, "out_features in_features"."""
        return (self.packed.float() * self.scale).to(self.dtype)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        return self._product(x, slice(None))

    def project(self, x: Tensor | Rounded, start: int, stop: int | None) -> Tensor:
        """Only the output channels start..stop."""
        return self._product(x, slice(start, stop))

    def _product(self, x: Tensor | Rounded, rows: slice) -> Tensor:
        own = x if isinstance(x, Rounded) else Rounded.of(x)
        made = torch._scaled_mm(
            own.packed.flatten(0, -2),
            self.packed[rows].T,
            scale_a=own.scale.flatten(0, -2),
            scale_b=self.scale.expand(self.out_features, 1)[rows].T.contiguous(),
            bias=None if self.bias is None else self.bias[rows],
            out_dtype=own.dtype,
            # An eighth faster on an H200, and no further from bfloat16: the numbers are rounded by more.
            use_fast_accum=own.packed.is_cuda,
        )
        return made.view(*own.shape[:-1], -1)


class LowRankLinear(nn.Module):
    """A linear layer and a low-rank difference kept apart from it (LoRA, arXiv 2106.09685).

    Args:
        base: the layer.
        down: "rank in_features"; up: "out_features rank", strength and alpha / rank multiplied in.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrix with the difference in it."""
        weight = self.base.weight
        return (weight + self.up @ self.down).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)

    def project(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Only the output channels start..stop."""
        difference = F.linear(F.linear(x, self.down), self.up[start:stop])
        return project_rows(self.base, x, start, stop) + difference


def in_parts(linear: nn.Module) -> bool:
    """Whether some of a linear layer's output channels can be computed without the others."""
    # torch 2.11's compiler fails over an 8-bit product with a part of the matrix, on cards alone.
    return not (isinstance(getattr(linear, "base", linear), Fp8Linear) and torch.compiler.is_compiling())


def project_rows(linear: nn.Module, x: Tensor, start: int, stop: int | None = None) -> Tensor:
    """Only the output channels start..stop of a linear layer of any kind, the others not computed."""
    if not isinstance(linear, nn.Linear):
        return linear.project(x, start, stop)
    bias = None if linear.bias is None else linear.bias[start:stop]
    return F.linear(x, linear.weight[start:stop], bias)


GROUP = 64  # weights that share a scale and a minimum in 4 bits, at most


def group_size(columns: int) -> int:
    """Inputs that share a scale in 4 bits: the halves of a row must hold whole groups."""
    return math.gcd(columns // 2, GROUP)


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
