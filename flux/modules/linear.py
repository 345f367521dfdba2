"""Linear layers whose weights are not one plain matrix.

They are packed by a file, quantised here, in 8-bit floats, or have a low-rank branch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.modules import gguf_blocks
from flux.modules.float8 import E4M3, EIGHT_BIT_FLOATS
from flux.modules.ops import Rounded, rounded


class CustomLinear(nn.Module):
    """A linear layer that is not an `nn.Linear`: a base class.

    Attributes:
        takes_rounded: Whether the input may also be `Rounded`.
    """

    takes_rounded = False

    @property
    def weight(self) -> Tensor:
        """The whole matrix, "out_features in_features", in the dtype of the computation."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map "... in_features" to "... out_features"."""
        return self.project(x)

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        raise NotImplementedError

    def can_project_rows(self) -> bool:
        """Return whether `project` can compute some output channels without the others."""
        return True


AnyLinear = nn.Linear | CustomLinear


def can_project_rows(linear: AnyLinear) -> bool:
    """Return whether `project_rows` works for this layer. Of other classes only the call is known."""
    if isinstance(linear, CustomLinear):
        return linear.can_project_rows()
    return type(linear) is nn.Linear


def project_rows(linear: AnyLinear, x: Tensor | Rounded, start: int = 0, stop: int | None = None) -> Tensor:
    """Compute only the output channels start..stop of a linear layer of any kind.

    Raises:
        TypeError: `x` is `Rounded`, which this layer does not take.
    """
    if isinstance(linear, Fp8Linear):
        return linear.project(x, start, stop)
    if isinstance(x, Rounded):
        raise TypeError(f"Got an input rounded to 8 bits for a {type(linear).__name__}")
    if isinstance(linear, CustomLinear):
        return linear.project(x, start, stop)
    return F.linear(x, linear.weight[start:stop], _rows(linear.bias, start, stop))


def _rows(bias: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return None if bias is None else bias[start:stop]


class PackedLinear(CustomLinear):
    """A linear layer whose matrix stays as a file packs it and is expanded at each use.

    Args:
        packed: The matrix as bytes, "out_features bytes".
        kind: Number format: one of `flux.modules.gguf_blocks.BLOCKS` or of `EIGHT_BIT_FLOATS`.
        bias: "out_features" or None.
        scale: Factor of 8-bit floats: one number, or one per row, "out_features 1".
        dtype: Type of the computation.
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
    def in_features(self) -> int:
        """The columns of the matrix."""
        weights, size = gguf_blocks.BLOCKS.get(self.kind, (1, 1))
        return self.packed.shape[1] // size * weights

    @property
    def weight(self) -> Tensor:
        """The whole matrix, expanded."""
        return self._expand(0, None)

    def _expand(self, start: int, stop: int | None) -> Tensor:
        rows = self.packed[start:stop]
        if self.kind in gguf_blocks.BLOCKS:
            return gguf_blocks.expand(rows, self.kind).to(self.dtype)
        numbers = rows.view(EIGHT_BIT_FLOATS[self.kind])
        if self.scale is None:
            return numbers.to(self.dtype)
        scale = self.scale[start:stop] if self.scale.ndim else self.scale
        return (numbers.float() * scale).to(self.dtype)

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        return F.linear(x, self._expand(start, stop), _rows(self.bias, start, stop))


class Fp8Linear(CustomLinear):
    """A linear layer that multiplies e4m3 weights and e4m3 activations, each row with its own scale.

    Products are summed in higher precision. The numbers of a `PackedLinear` in e4m3 are kept as they are.

    Args:
        linear: The layer to convert.
        device: Where it is converted. If None, where it is.
    """

    takes_rounded = True
    packed: Tensor  # "out_features in_features"
    scale: Tensor  # "out_features 1", or "1 1" if the file has a single scale
    bias: Tensor | None

    def __init__(self, linear: nn.Linear | PackedLinear, device: torch.device | str | None = None):
        super().__init__()
        if isinstance(linear, PackedLinear):
            packed = linear.packed.detach().to(device).view(E4M3)
            stored = torch.ones(()) if linear.scale is None else linear.scale.detach().float()
            scale = stored.to(packed.device).view(-1, 1)
            self.dtype = linear.dtype
        else:
            packed, scale = rounded(linear.weight.detach().to(device))
            self.dtype = linear.weight.dtype
        self.out_features, self.in_features = packed.shape
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(packed.device))

    @property
    def weight(self) -> Tensor:
        """The whole matrix, scaled."""
        return (self.packed.float() * self.scale).to(self.dtype)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """Map "... in_features" to "... out_features"."""
        return self.project(x)

    def project(self, x: Tensor | Rounded, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        x = x if isinstance(x, Rounded) else Rounded.of(x)
        y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]  # public only since torch 2.10
            x.packed.flatten(0, -2),
            self.packed[start:stop].T,
            scale_a=x.scale.flatten(0, -2),
            scale_b=self.scale.expand(self.out_features, 1)[start:stop].T.contiguous(),
            bias=_rows(self.bias, start, stop),
            out_dtype=x.dtype,
            # An eighth faster on an H200, and no less exact: rounding to e4m3 loses more.
            use_fast_accum=x.packed.is_cuda,
        )
        return y.view(*x.shape[:-1], -1)

    def can_project_rows(self) -> bool:
        """Return False in compiled code: torch 2.11's compiler fails to slice the matrix on GPUs."""
        return not torch.compiler.is_compiling()


class LowRankLinear(CustomLinear):
    """A linear layer with a low-rank branch beside it (LoRA, arXiv 2106.09685).

    Args:
        base: The layer.
        down: First matrix of the branch, "rank in_features".
        up: Second matrix, "out_features rank", with the strength and alpha / rank multiplied in.
    """

    def __init__(self, base: AnyLinear, down: Tensor, up: Tensor):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The matrix of the layer with the product of the branch added."""
        weight = self.base.weight
        return (weight + self.up @ self.down).to(weight.dtype)

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        branch = F.linear(F.linear(x, self.down), self.up[start:stop])
        return project_rows(self.base, x, start, stop) + branch

    def can_project_rows(self) -> bool:
        """Return whether the layer can do it."""
        return can_project_rows(self.base)


class QuantizedLinear(CustomLinear):
    """A linear layer with weights in 8 or 4 bits. It computes in the dtype that it was made from.

    8 bits: one scale per output channel, weight = scale * q with q in -127..127.

    4 bits: a scale and a minimum per group of 64 inputs (fewer if 128 does not divide the inputs), weight =
    minimum + scale * q with q in 0..15. That is 4.5 bits per weight in a 16-bit dtype. A byte holds a weight
    of the first half of a row and one of the second.

    Args:
        linear: The layer to convert.
        bits: 8 or 4.
        device: Where it is converted. If None, where it is.

    Raises:
        ValueError: If `bits` is neither 8 nor 4.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor | None
    bias: Tensor | None

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
        """The whole matrix, expanded."""
        return self._expand(0, None)

    def _expand(self, start: int, stop: int | None) -> Tensor:
        packed, scale = self.packed[start:stop], self.scale[start:stop]
        if self.minimum is None:
            return packed * scale
        minima, scales = self.minimum[start:stop].chunk(2, dim=1), scale.chunk(2, dim=1)
        halves = zip(minima, (packed & 15, packed >> 4), scales, strict=True)
        weights = [torch.addcmul(minimum, q, scale) for minimum, q, scale in halves]
        return torch.cat(weights, dim=1).flatten(1)

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        return F.linear(x, self._expand(start, stop), _rows(self.bias, start, stop))


LARGEST_GROUP = 64


def group_size(columns: int) -> int:
    """Return the number of inputs that share a scale in 4 bits. Half a row is a whole number of groups."""
    return math.gcd(columns // 2, LARGEST_GROUP)


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
    """Replace the zero scale of a row or group of equal weights."""
    return scale.float().clamp(min=torch.finfo(scale.dtype).tiny)
