"""Blocks for Hopper GPUs: each matmul does the operation after it before it writes its result.

These operations are GELU, the norm and rotation of queries and keys, and the gated sum. The matmuls come from
quack-kernels, attention from flash-attn-4. Kernels are compiled when they are first called, and kept on disk.

Results stay in float32 until they are written and are rounded once, where `flux.modules.layers` rounds in
between. There are no gradients. Each row of a batch comes out as it would alone.
"""

# These packages are installed on Hopper GPUs only.
# pyright: reportMissingImports=false

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flux.math import PLAIN as PLAIN_EDIT
from flux.math import AttentionEdit, QueriesKeysValues
from flux.modules.layers import DoubleStreamBlock, Modulation, SelfAttention, SingleStreamBlock
from flux.modules.linear import Fp8Linear
from flux.modules.norms import QKNorm, RMSNorm, split_modulation
from flux.modules.ops import Rounded, has_kernel
from flux.modules.projections import modulate, split_heads

# Before the import, which reads it.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# flash-attn-4 warns about its own arguments when it compiles its kernel.
warnings.filterwarnings("ignore", ".* cannot be converted to a JitArgument", UserWarning)

from flash_attn.cute.interface import _flash_attn_fwd  # noqa: E402  (see above)
from quack.activation import gelu_tanh_approx  # noqa: E402
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # noqa: E402
from quack.epilogue.head_rmsnorm import HeadRstd  # noqa: E402
from quack.epilogue.ops import ColVecLoad, RowVecLoad  # noqa: E402
from quack.epilogue.rotary import rotary_cos_sin_load  # noqa: E402
from quack.gemm_runtime.host import run_gemm_epi_plan  # noqa: E402

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


# ---- the steps of a block


@cached_by_tensor
def _table(pe: Tensor) -> Tensor:
    """Cosines and sines, interleaved: rotations "B 1 N D/2 2 2" -> "B N D". Made once for all layers."""
    return pe[:, 0, :, :, :, 0].flatten(2).contiguous()  # the first column of each pair's matrix


@dataclass(eq=False)
class Heads:
    """Projects tokens to queries, keys and values, straight into their places.

    Attributes:
        linear: Its output channels begin with those of queries, keys and values.
        norm: Normalises queries and keys.
        num_heads: Number of heads.
        x: Input, "B n C".
        table: Rotations, from `_table`, "B n D" or "1 n D".
        qk: Where queries and keys go, "B n 2C".
        v: Where values go, "B n C".
    """

    linear: nn.Module
    norm: QKNorm
    num_heads: int
    x: Tensor | Rounded
    table: Tensor
    qk: Tensor
    v: Tensor

    def project_q(self) -> None:
        """Write the queries alone, normalised and rotated."""
        self._project(0, 1, self.norm.query_norm)

    def project_k(self) -> None:
        """Write the keys alone, normalised and rotated."""
        self._project(1, 2, self.norm.key_norm)

    def project_qk(self) -> None:
        """Write queries and keys, normalised and rotated."""
        self._project(0, 2, self.norm.query_norm, self.norm.key_norm)

    def project_v(self) -> None:
        """Write the values."""
        width = self.x.shape[-1]
        PLAIN(self.linear, self.x, 2 * width, 3 * width, self.v)

    def _project(self, start: int, stop: int, *norms: RMSNorm) -> None:
        """Write the channels from start * C to stop * C."""
        start, stop = start * self.x.shape[-1], stop * self.x.shape[-1]
        scale = torch.cat([norm.scale.expand(self.num_heads, -1) for norm in norms]).flatten()
        vectors = {"rstd": self.table.shape[-1], "scale": scale.expand(len(self.qk), -1)}
        out = self.qk[..., start:stop]
        if len(self.table) == 1:
            HEADS(self.linear, self.x, start, stop, out, rotations=self.table[0], **vectors)
            return
        # A kernel has one table of rotations for all rows.
        vectors["scale"] = scale[None]
        for row in range(len(self.table)):
            one = slice(row, row + 1)
            HEADS(self.linear, self.x[one], start, stop, out[one], rotations=self.table[row], **vectors)


def _places(x: Tensor | Rounded, tokens: int) -> tuple[Tensor, Tensor]:
    """Uninitialised places for queries with keys, "B N 2C", and for values, "B N C"."""
    batch, _, width = x.shape
    return x.new_empty(batch, tokens, 2 * width), x.new_empty(batch, tokens, width)


def _split(qk: Tensor, v: Tensor, num_heads: int) -> QueriesKeysValues:
    """Queries, keys and values, "B H N D" each: views of their places."""
    q, k = (split_heads(part, num_heads) for part in qk.chunk(2, dim=-1))
    return q, k, split_heads(v, num_heads)


def _inject(edit: AttentionEdit, k: Tensor, v: Tensor) -> None:
    """`AttentionEdit.inject` in place, "B H I D" each."""
    for own, injected in zip((k, v), edit.kv or ()):
        if injected is not None and edit.kv_weight is None:
            own.copy_(injected)
        elif injected is not None and edit.kv_weight is not None:
            own.lerp_(injected, edit.kv_weight)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax attention by flash-attn-4: three times "B H N D" -> "B N C", in `out` if that is given."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    place = None if out is None else out.unflatten(-1, q.shape[2:])
    attn = _flash_attn_fwd(q, k, v, out=place)[0]
    return attn.flatten(2) if out is None else out


def _hidden(linear: nn.Module, x: Tensor | Rounded, width: int, start: int = 0, free: int = 0) -> Tensor:
    """The GELU of the MLP's hidden channels, "B N M".

    Args:
        linear: Projects to the hidden channels, with its output channels from `start` on.
        x: Input, "B N C".
        width: Number of hidden channels, M.
        start: First of the output channels.
        free: Number of uninitialised channels to put before them, for attention's result.
    """
    wide = x.new_empty(*x.shape[:2], free + width)
    GELU(linear, x, start, None, wide[..., free:])
    return wide


def _add_gated(stream: Tensor, gate: Tensor, linear: nn.Module, x: Tensor | Rounded) -> Tensor:
    """The sum stream + gate * linear(x), "B N C"."""
    gate = gate[:, 0].expand(stream.shape[0], -1)
    return GATED(linear, x, stream=stream.contiguous(), gate=gate)


class HopperDoubleBlock(DoubleStreamBlock):
    """A double-stream block with fused kernels. On a CPU, or with gradients, it is a plain one."""

    def run(
        self, img: Tensor, txt: Tensor, mods: Tensor, pe: Tensor, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """See `DoubleStreamBlock.run`."""
        if not has_kernel(img):
            return super().run(img, txt, mods, pe, edit)
        img_mod1, img_mod2, txt_mod1, txt_mod2 = split_modulation(mods, 4)
        img_in = modulate(self.img_norm1, img, img_mod1, self.img_attn.qkv)
        txt_in = modulate(self.txt_norm1, txt, txt_mod1, self.txt_attn.qkv)
        img_attn, txt_attn, qkv = self.fused_attention(img_in, txt_in, pe, edit)

        img = _add_gated(img, img_mod1.gate, self.img_attn.proj, img_attn)
        img_in = modulate(self.img_norm2, img, img_mod2, self.img_mlp[0])
        hidden = _hidden(self.img_mlp[0], img_in, self.mlp_hidden_dim)
        img = _add_gated(img, img_mod2.gate, self.img_mlp[2], hidden)

        txt = _add_gated(txt, txt_mod1.gate, self.txt_attn.proj, txt_attn)
        txt_in = modulate(self.txt_norm2, txt, txt_mod2, self.txt_mlp[0])
        hidden = _hidden(self.txt_mlp[0], txt_in, self.mlp_hidden_dim)
        txt = _add_gated(txt, txt_mod2.gate, self.txt_mlp[2], hidden)
        return img, txt, qkv

    def fused_attention(
        self, img: Tensor | Rounded, txt: Tensor | Rounded, pe: Tensor, edit: AttentionEdit
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """See `DoubleStreamBlock.joint_attention`. Both streams are projected into the same tensors."""
        num_txt, table = txt.shape[1], _table(pe)
        qk, v = _places(img, num_txt + img.shape[1])
        q, k, values = _split(qk, v, self.num_heads)

        def heads(attn: SelfAttention, x: Tensor | Rounded, tokens: slice) -> Heads:
            places = table[:, tokens], qk[:, tokens], v[:, tokens]
            return Heads(attn.qkv, attn.norm, self.num_heads, x, *places)

        txt_heads = heads(self.txt_attn, txt, slice(num_txt))
        img_heads = heads(self.img_attn, img, slice(num_txt, None))
        txt_heads.project_qk()
        txt_heads.project_v()
        if not edit.splits_qkv:
            img_heads.project_qk()
        elif not edit.whole_kv:
            img_heads.project_k()
        if not edit.whole_kv:
            img_heads.project_v()
        _inject(edit, k[:, :, num_txt:], values[:, :, num_txt:])

        wait = edit.start_exchange(k, values)
        if edit.splits_qkv:
            img_heads.project_q()
        attn = attend(q, *wait())
        return attn[:, num_txt:], attn[:, :num_txt], (q, k, values) if edit.record else None


class HopperSingleBlock(SingleStreamBlock):
    """A single-stream block with fused kernels. On a CPU, or with gradients, it is a plain one."""

    def run(
        self, x: Tensor, mods: Tensor, pe: Tensor, num_txt: int = 0, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, QueriesKeysValues | None]:
        """See `SingleStreamBlock.run`."""
        if not has_kernel(x):
            return super().run(x, mods, pe, num_txt, edit)
        (mod,) = split_modulation(mods, 1)
        x_in = modulate(self.pre_norm, x, mod, self.linear1)
        q, k, v = self.fused_heads(x_in, pe, num_txt, edit)

        wait = edit.start_exchange(k, v)
        hidden = _hidden(self.linear1, x_in, self.mlp_hidden_dim, 3 * self.hidden_dim, free=self.hidden_dim)
        attend(q, *wait(), hidden[..., : self.hidden_dim])
        x = _add_gated(x, mod.gate, self.linear2, hidden)
        return x, (q, k, v) if edit.record else None

    def fused_heads(
        self, x: Tensor | Rounded, pe: Tensor, num_txt: int, edit: AttentionEdit
    ) -> QueriesKeysValues:
        """Queries, keys and values, with those of `edit` injected."""
        table, (qk, v) = _table(pe), _places(x, x.shape[1])
        whole = Heads(self.linear1, self.norm, self.num_heads, x, table, qk, v)
        if edit.whole_kv:
            txt = x[:, :num_txt], table[:, :num_txt], qk[:, :num_txt], v[:, :num_txt]
            txt_heads = Heads(self.linear1, self.norm, self.num_heads, *txt)
            whole.project_q()
            txt_heads.project_k()
            txt_heads.project_v()
        else:
            whole.project_qk()
            whole.project_v()
        q, k, values = _split(qk, v, self.num_heads)
        _inject(edit, k[:, :, num_txt:], values[:, :, num_txt:])
        return q, k, values


def use_hopper(block: DoubleStreamBlock | SingleStreamBlock) -> None:
    """Turn a block into one with fused kernels, in place: the same weights, another `run`."""
    if isinstance(block, DoubleStreamBlock):
        block.__class__ = HopperDoubleBlock
    else:
        block.__class__ = HopperSingleBlock


def serves(block: nn.Module) -> bool:
    """Whether the kernels serve a block: linear layers in bfloat16 or 8-bit floats, heads of known sizes."""
    parts = [x for part in block.children() if not isinstance(part, Modulation) for x in part.modules()]
    return all(
        isinstance(part, Fp8Linear)
        or (isinstance(part, RMSNorm) and len(part.scale) in HEAD_SIZES)
        or (type(part) is nn.Linear and part.weight.dtype == torch.bfloat16 and part.bias is not None)
        for part in parts
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    )
