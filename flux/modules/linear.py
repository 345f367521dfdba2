"""Linear layers whose weights stay as a file packs them, those that compute in 8-bit floats, and low-rank
differences beside any linear layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.modules.ops import E4M3, Rounded, rounded
from flux.weights import gguf

EIGHT_BIT = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


class PackedLinear(nn.Module):
    """A linear layer whose matrix is expanded anew each time it is used.

    Args:
        packed: the matrix as bytes, "out_features bytes".
        kind: of its numbers: one of `flux.weights.gguf.BLOCKS`, or "F8_E4M3" or "F8_E5M2".
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
        if self.kind in gguf.BLOCKS:
            return gguf.expand(rows, self.kind).to(self.dtype)
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
