"""What lies between the products of a block, each in one pass over memory where a kernel is to be had.

Kernels serve CUDA tensors that want no gradients; everything else, and their tests, the plain PyTorch here.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.math import apply_rope, rotate

if TYPE_CHECKING:
    from flux.modules.norms import ModulationOut, QKNorm, RMSNorm

# Triton comes with the builds of torch that know cards.
if torch.backends.cuda.is_built() and find_spec("triton"):
    from flux.modules import ops_triton
else:
    ops_triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


FIRST_CARD = (8, 0)  # CUDA compute capability that Triton knows: Ampere and later
_able: bool | None = None


def _card_is_able() -> bool:
    global _able
    if _able is None:
        _able = torch.cuda.get_device_capability() >= FIRST_CARD
    return _able


def prepare_compiling() -> None:
    """A compiler that traces the blocks is to ask once for the card, and not look into the question."""
    # Not as a decorator, which would import the compiler with this module: more than a second.
    torch.compiler.assume_constant_result(_card_is_able)


def has_kernel(x: Tensor) -> bool:
    """Whether `x` is treated by our kernels."""
    return ops_triton is not None and x.is_cuda and not torch.is_grad_enabled() and _card_is_able()


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each over a scale of its own that brings its largest number to the largest there is.

    Returns:
        "... columns" in e4m3, and the scales, "... 1", in float32.
    """
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


@dataclass(frozen=True, eq=False)
class Rounded:
    """A stream that is `rounded` already, for linear layers whose `takes_rounded` is true.

    Attributes:
        packed: "B N C" in e4m3; scale: "B N 1", in float32.
        dtype: what it was rounded from.
    """

    packed: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Rounded":
        made = ops_triton.join(x, None, True) if has_kernel(x) and x.ndim == 3 else rounded(x)
        return cls(*made, x.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.packed.shape

    def new_empty(self, *shape: int) -> Tensor:
        """As of the tensor that was rounded."""
        return self.scale.new_empty(*shape, dtype=self.dtype)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> "Rounded":
        return Rounded(self.packed[index], self.scale[index], self.dtype)


def norm_and_turn(norm: "QKNorm", q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, normalised and turned by `pe` ("B 1 N D/2 2 2"): "B H N D" three times -> twice."""
    if _turns(q):
        query, key = norm.query_norm, norm.key_norm
        return ops_triton.norm_and_turn(pe, query.eps, q, query.scale, k, key.scale)
    return apply_rope(*norm(q, k, v), pe)


def norm_and_turn_one(norm: "RMSNorm", x: Tensor, pe: Tensor) -> Tensor:
    """Queries or keys alone as `norm_and_turn` makes them, "B H N D"."""
    if _turns(x):
        return ops_triton.norm_and_turn(pe, norm.eps, x, norm.scale)[0]
    return rotate(norm(x), pe)


def _turns(x: Tensor) -> bool:
    return has_kernel(x) and x.shape[-1] & (x.shape[-1] - 1) == 0


def modulated(norm: nn.LayerNorm, x: Tensor, mod: "ModulationOut", linear: nn.Module) -> Tensor | Rounded:
    """The stream "B N C", normalised and modulated, on its way into `linear`."""
    if not has_kernel(x):
        return mod.applied_to(norm(x))
    return _made(x, linear, ops_triton.modulate, x, mod.shift, mod.scale, norm.eps)


def with_gelu(mixed: Tensor | None, hidden: Tensor, linear: nn.Module) -> Tensor | Rounded:
    """`mixed`, if any, and behind it the GELU (by tanh) of `hidden`, "B N C" each, on their way into
    `linear`.
    """
    if has_kernel(hidden):
        return _made(hidden, linear, ops_triton.join, mixed, hidden)
    hidden = F.gelu(hidden, approximate="tanh")
    return hidden if mixed is None else torch.cat((mixed, hidden), dim=-1)


def _made(x: Tensor, linear: nn.Module, kernel, *given) -> Tensor | Rounded:
    rounding = getattr(linear, "takes_rounded", False)
    result, scale = kernel(*given, rounding)
    return Rounded(result, scale, x.dtype) if rounding else result
