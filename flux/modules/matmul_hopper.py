"""Matmuls for Hopper GPUs that do the operation after them before they write their result, by quack-kernels.

These operations are GELU, the norm and rotation of queries and keys, and the gated sum. Kernels are compiled
when they are first called, and kept on disk. There are no gradients.
"""

# These packages are installed on Hopper GPUs only.
# pyright: reportMissingImports=false

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from quack.activation import gelu_tanh_approx
from quack.epilogue.frontend import gemm_epilogue, pack, unpack
from quack.epilogue.head_rmsnorm import HeadRstd
from quack.epilogue.ops import ColVecLoad, RowVecLoad
from quack.epilogue.rotary import rotary_cos_sin_load
from quack.gemm_runtime.host import run_gemm_epi_plan
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flux.modules.linear import Fp8Linear
from flux.modules.norms import RMSNorm
from flux.modules.ops import Rounded

# ---- what follows a matmul: `acc` is its result, in float32


def _channel_vectors(*names: str) -> dict[str, RowVecLoad]:
    """Operands with one number for each output channel."""
    return {name: RowVecLoad(name) for name in names}


def _scales() -> dict[str, RowVecLoad | ColVecLoad]:
    """Operands of 8-bit matmuls: a scale for each token, and a scale and bias for each channel."""
    return {"token_scale": ColVecLoad("token_scale"), **_channel_vectors("channel_scale", "bias")}


def _norm_and_rope() -> dict[str, Any]:
    """Operands of QK-norm and rotary embedding. `rotations` interleaves cosines and sines."""
    return {
        "rotations": rotary_cos_sin_load("rotations"),
        "rstd": HeadRstd("rstd", eps=RMSNorm.eps),
        **_channel_vectors("scale"),
    }


@gemm_epilogue(ops=_channel_vectors("bias"))
def _plain(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops=_scales())
def _plain_8bit(acc, token_scale, channel_scale, bias):
    return {"D": acc * token_scale * channel_scale + bias}


@gemm_epilogue(ops=_channel_vectors("bias"))
def _gelu(acc, bias):
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops=_scales())
def _gelu_8bit(acc, token_scale, channel_scale, bias):
    return {"D": gelu_tanh_approx(acc * token_scale * channel_scale + bias)}


@gemm_epilogue(ops=_channel_vectors("bias", "gate"))
def _gated(acc, c, bias, gate):
    return {"D": c + (acc + bias) * gate}


@gemm_epilogue(ops=_scales() | _channel_vectors("gate"))
def _gated_8bit(acc, c, token_scale, channel_scale, bias, gate):
    return {"D": c + (acc * token_scale * channel_scale + bias) * gate}


def _square(acc, bias):
    return {"rstd": (acc + bias) * (acc + bias)}


@gemm_epilogue(
    ops=_norm_and_rope() | _channel_vectors("bias"), prepass=_square, prepass_outs=("rstd",), mode="acc_pair"
)
def _heads(acc, rotations, rstd, scale, bias):
    first, second = unpack((acc + bias) * rstd * scale)
    cos, sin = unpack(rotations)
    return {"D": pack(first * cos - second * sin, first * sin + second * cos)}


def _square_8bit(acc, token_scale, channel_scale, bias):
    x = acc * token_scale * channel_scale + bias
    return {"rstd": x * x}


@gemm_epilogue(
    ops=_norm_and_rope() | _scales(), prepass=_square_8bit, prepass_outs=("rstd",), mode="acc_pair"
)
def _heads_8bit(acc, rotations, rstd, scale, token_scale, channel_scale, bias):
    first, second = unpack((acc * token_scale * channel_scale + bias) * rstd * scale)
    cos, sin = unpack(rotations)
    return {"D": pack(first * cos - second * sin, first * sin + second * cos)}


# ---- the matmuls


@dataclass(frozen=True)
class Tile:
    """The part of a result that one multiprocessor computes at a time.

    Attributes:
        tokens: Its height.
        channels: Its width.
        speed: Speed in bfloat16 and in 8 bits with all multiprocessors busy, relative to the first tile's.
            Measured on an H200, where it varies by 3 %.
        cluster: Number of multiprocessors, over tokens and over channels, that share what they read.
        pingpong: Whether a tile is computed while the one before is written.
    """

    tokens: int
    channels: int
    speed: tuple[float, float]
    cluster: tuple[int, int] = (2, 1)
    pingpong: bool = True

    def cost(self, tokens: int, channels: int, batch: int, in_8bit: bool, processors: int) -> float:
        """Time of a matmul, in no unit: its last round takes as long as one with all processors busy."""
        down, across = (
            n * math.ceil(math.ceil(size / part) / n)
            for size, part, n in zip((tokens, channels), (self.tokens, self.channels), self.cluster)
        )
        rounds = math.ceil(batch * down * across / processors)
        return rounds * self.tokens * self.channels / self.speed[in_8bit]


TILES = (
    Tile(192, 128, (1.0, 1.0), cluster=(1, 2)),
    Tile(128, 192, (1.0, 0.98)),
    Tile(128, 176, (0.99, 0.99)),
    Tile(128, 160, (1.0, 0.94)),
    Tile(128, 144, (0.98, 0.97)),
    Tile(128, 128, (0.97, 0.97)),
    Tile(128, 96, (0.88, 0.88)),
    Tile(64, 128, (0.8, 0.8)),
    Tile(64, 96, (0.7, 0.78)),
)
# For sums over so many channels that it matters little that nothing is computed while a tile is written.
LONG_SUM_TILE = Tile(192, 192, (1.03, 1.03), pingpong=False)
LONG_SUM = 12288
HEADS_WIDTH = 128  # tiles of a multiple of this width hold whole heads of
HEAD_SIZES = (32, 64, 128)  # these sizes


T = TypeVar("T")


def cached_by_tensor(make: Callable[..., T]) -> Callable[..., T]:
    """Cache `make(tensor, *more)` as long as the tensor lives, which functools.cache would keep alive."""
    results = WeakTensorKeyDictionary()

    def cached(tensor: Tensor, *more) -> T:
        known: dict[tuple, T] = results.setdefault(tensor, {})  # pyright: ignore  (its stub forgets the type)
        if more not in known:
            known[more] = make(tensor, *more)
        return known[more]

    return cached


@cached_by_tensor
def _operands(
    matrix: Tensor, bias: Tensor, scale: Tensor | None, start: int, stop: int | None, batch: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of a linear layer's matrix, "B channels K", and their bias and scales, "B channels" each."""
    # Of their data: a view of the matrix itself would keep it alive, and so this entry.
    vectors = {"bias": bias.data[start:stop].expand(batch, -1)}
    if scale is not None:
        scales = scale.data.expand(len(matrix), 1)[start:stop, 0].contiguous()
        vectors["channel_scale"] = scales.expand(batch, -1)
    return matrix.data[start:stop].expand(batch, -1, -1), vectors


@dataclass(eq=False)
class Matmul:
    """A matmul and the operation after it, its epilogue, in one kernel.

    Attributes:
        epilogue: The operation after a matmul in bfloat16.
        epilogue_8bit: The same after a matmul of 8-bit floats.
        whole_heads: Whether tiles must hold whole heads.
        plans: What quack-kernels worked out for tensors of some layout.
    """

    epilogue: Any
    epilogue_8bit: Any
    whole_heads: bool = False
    plans: dict[tuple, Any] = field(default_factory=dict)

    def tile(self, left: Tensor, right: Tensor) -> Tile:
        """The tile that is likely to be the fastest for "B N K" times "B channels K"."""
        (batch, tokens, inner), channels = left.shape, right.shape[1]
        tiles = [*TILES, LONG_SUM_TILE] if inner >= LONG_SUM else TILES
        if self.whole_heads:
            tiles = [tile for tile in tiles if tile.channels % HEADS_WIDTH == 0]
        processors = torch.cuda.get_device_properties(left.device).multi_processor_count
        in_8bit = left.dtype.itemsize == 1
        return min(tiles, key=lambda tile: tile.cost(tokens, channels, batch, in_8bit, processors))

    def __call__(
        self, linear: nn.Module, x: Tensor | Rounded, start: int = 0, stop: int | None = None,
        out: Tensor | None = None, stream: Tensor | None = None, **vectors: Tensor | int,
    ) -> Tensor:  # fmt: skip
        """Launch the kernel.

        Args:
            linear: The linear layer.
            x: Its input, "B N K".
            start: First output channel to compute.
            stop: Output channel before which to stop. If None, the last one is computed too.
            out: Where to write the result. If None, a new tensor.
            stream: Residual stream that the epilogue adds to, "B N channels".
            vectors: Further operands of the epilogue.

        Returns:
            "B N channels".
        """
        in_8bit = isinstance(linear, Fp8Linear)
        if in_8bit and not isinstance(x, Rounded):
            x = Rounded.of(x)
        left = x.packed if isinstance(x, Rounded) else x
        batch, tokens, _ = left.shape
        matrix, scale = (linear.packed, linear.scale) if in_8bit else (linear.weight, None)
        right, own_vectors = _operands(matrix, linear.bias, scale, start, stop, batch)
        vectors |= own_vectors
        if isinstance(x, Rounded):
            # Each row has to begin at a multiple of 16 bytes.
            scales = x.scale[..., 0]
            vectors["token_scale"] = F.pad(scales, (0, 4 - tokens % 4))[:, :tokens] if tokens % 4 else scales
        if out is None:
            out = x.new_empty(batch, tokens, right.shape[1])
        layout = [left.stride(), right.stride(), out.stride(), None if stream is None else stream.stride()]
        key = (in_8bit, left.shape, right.shape, left.device, *layout)
        plan = self.plans.get(key)
        if plan is not None:
            run_gemm_epi_plan(plan, left, right, out, stream, vectors)
            return out
        tile, epilogue = self.tile(left, right), self.epilogue_8bit if in_8bit else self.epilogue
        # Exact sums are eight times slower, and no nearer to bfloat16: rounding the numbers costs more.
        more = {"post_init_attrs": (("fp8_slow_accum", False),)} if in_8bit else {}
        self.plans[key] = epilogue.gemm(
            left, right, out, stream, epi_args=vectors, tile_M=tile.tokens, tile_N=tile.channels,
            cluster_M=tile.cluster[0], cluster_N=tile.cluster[1], pingpong=tile.pingpong, **more,
        )  # fmt: skip
        return out


PLAIN, GELU, GATED = Matmul(_plain, _plain_8bit), Matmul(_gelu, _gelu_8bit), Matmul(_gated, _gated_8bit)
HEADS = Matmul(_heads, _heads_8bit, whole_heads=True)
