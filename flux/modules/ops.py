"""The operations between a block's linear layers, each one pass over memory where a Triton kernel serves it.

The kernels (`flux.modules.ops_triton`) serve CUDA tensors that need no gradients. Everything else, and the
kernels' tests, use the plain PyTorch here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from flux.math import rotate
from flux.modules.float8 import E4M3, E4M3_MAX

# Triton comes with torch's builds for GPUs.
if torch.backends.cuda.is_built() and find_spec("triton"):
    from flux.modules import ops_triton
else:
    ops_triton = None

OLDEST_GPU = (8, 0)  # CUDA compute capability that Triton supports: Ampere and later


@cache
def gpu_capability() -> tuple[int, int]:
    """The CUDA compute capability of the current GPU, asked once."""
    return torch.cuda.get_device_capability()


def gpu_runs_triton() -> bool:
    """Whether Triton supports the current GPU."""
    return gpu_capability() >= OLDEST_GPU


def prepare_compiling() -> None:
    """Make `gpu_runs_triton` a constant for torch.compile."""
    # Not as a decorator, which would import the compiler with this module: more than a second.
    torch.compiler.assume_constant_result(gpu_runs_triton)


def has_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel serves `x`."""
    return ops_triton is not None and x.is_cuda and not torch.is_grad_enabled() and gpu_runs_triton()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Serve no tensor with a kernel inside the block: passes with and without gradients then round alike."""
    global ops_triton
    kernels, ops_triton = ops_triton, None
    try:
        yield
    finally:
        ops_triton = kernels


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to e4m3, each row divided by a scale that brings its largest number to the largest of e4m3.

    Returns:
        "... columns" in e4m3, and the scales, "... 1", in float32.
    """
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


@dataclass(frozen=True, eq=False)
class Rounded:
    """A tensor rounded to e4m3, as linear layers take it that compute in 8 bits.

    Attributes:
        packed: "B N C" in e4m3.
        scale: Scale of each row, "B N 1", in float32.
        dtype: Dtype of the tensor before it was rounded, in which the linear layer answers.
    """

    packed: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Rounded":
        """Round `x`, "... C"."""
        if ops_triton is not None and has_kernel(x) and x.ndim == 3:
            return cls(*ops_triton.concat_gelu(x, None, True), x.dtype)
        return cls(*rounded(x), x.dtype)

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that was rounded."""
        return self.packed.shape

    def new_empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of the dtype that was rounded."""
        return self.scale.new_empty(*shape, dtype=self.dtype)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Rounded":
        return Rounded(self.packed[index], self.scale[index], self.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, eps: float, pe: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS-normalise queries and keys per head, then rotate them by `pe`.

    Args:
        q: Queries, "B H N D".
        k: Keys, "B H N D".
        q_scale: Scale of the queries' norm, "D".
        k_scale: Scale of the keys' norm, "D".
        eps: Added to the mean square.
        pe: Rotations, "B 1 N D/2 2 2".
    """
    if ops_triton is not None and _serves_heads(q):
        return ops_triton.qk_norm_rope(q, k, q_scale, k_scale, eps, pe)
    return _norm_rope(q, q_scale, eps, pe), _norm_rope(k, k_scale, eps, pe)


def norm_rope(x: Tensor, scale: Tensor, eps: float, pe: Tensor) -> Tensor:
    """Queries or keys alone, "B H N D", as `qk_norm_rope` makes them."""
    if ops_triton is not None and _serves_heads(x):
        return ops_triton.norm_rope(x, scale, eps, pe)
    return _norm_rope(x, scale, eps, pe)


def _norm_rope(x: Tensor, scale: Tensor, eps: float, pe: Tensor) -> Tensor:
    return rotate(F.rms_norm(x, scale.shape, scale, eps=eps).to(x.dtype), pe)


def _serves_heads(x: Tensor) -> bool:
    """Whether the head size is a power of two, as the kernel needs it."""
    return has_kernel(x) and x.shape[-1] & (x.shape[-1] - 1) == 0


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, rounding: bool) -> Tensor | Rounded:
    """(1 + scale) * layer_norm(x) + shift.

    Args:
        x: "B N C".
        shift: "B 1 C" or "1 1 C".
        scale: "B 1 C" or "1 1 C".
        eps: Added to the variance.
        rounding: Whether the kernel also rounds to e4m3. Plain PyTorch leaves that to the linear layer.
    """
    if ops_triton is None or not has_kernel(x):
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    result, scales = ops_triton.norm_modulate(x, shift, scale, eps, rounding)
    return Rounded(result, scales, x.dtype) if rounding else result


def concat_gelu(x: Tensor | None, hidden: Tensor, rounding: bool) -> Tensor | Rounded:
    """Concatenate `x`, if it is given, and the GELU (tanh) of `hidden` along the channels, "B N C" each.

    Args:
        x: "B N C" or None.
        hidden: "B N M".
        rounding: Whether the kernel also rounds to e4m3. Plain PyTorch leaves that to the linear layer.
    """
    if ops_triton is None or not has_kernel(hidden):
        hidden = F.gelu(hidden, approximate="tanh")
        return hidden if x is None else torch.cat((x, hidden), dim=-1)
    result, scales = ops_triton.concat_gelu(x, hidden, rounding)
    return Rounded(result, scales, hidden.dtype) if rounding else result


def copy_tokens(x: Tensor, places: Tensor, out: Tensor) -> None:
    """Copy some tokens of a sequence into another one.

    Args:
        x: "B N C".
        places: Places of the tokens in `x`, "n".
        out: Where they go, "B n C".
    """
    if ops_triton is None or not has_kernel(out):
        out.copy_(x[:, places])
    else:
        ops_triton.copy_tokens(x, places, out)
