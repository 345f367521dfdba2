"""A block's products, each of which does what follows it before it writes its result: GELU, the norm and
rotation of queries and keys, the gated sum. By quack-kernels; attention by flash-attn-4. Their kernels are
made for a card when first called, and kept on disk.

Sums are in float32 up to the result, which is rounded once where `flux.modules.projections.Apart` rounds in
between. They know no gradients. Each row of a batch comes out as it would by itself.
"""

import math
import os
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from flux.math import PLAIN as PLAIN_EDIT
from flux.math import AttentionEdit, QueriesKeysValues
from flux.modules.layers import DoubleStreamBlock, Modulation, SingleStreamBlock
from flux.modules.linear import Fp8Linear
from flux.modules.norms import QKNorm, RMSNorm, split_modulation
from flux.modules.ops import Rounded, has_kernel
from flux.modules.projections import modulate, split_heads

# Before the import, for it is read there.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
# Of attention's own arguments, when its kernel is made.
warnings.filterwarnings("ignore", ".* cannot be converted to a JitArgument", UserWarning)

from flash_attn.cute.interface import _flash_attn_fwd  # noqa: E402
from quack.activation import gelu_tanh_approx  # noqa: E402
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # noqa: E402
from quack.epilogue.head_rmsnorm import HeadRstd  # noqa: E402
from quack.epilogue.ops import ColVecLoad, RowVecLoad  # noqa: E402
from quack.epilogue.rotary import rotary_cos_sin_load  # noqa: E402
from quack.gemm_runtime.host import run_gemm_epi_plan  # noqa: E402


def _rows(*names: str) -> dict[str, RowVecLoad]:
    """Vectors with a number for each output channel."""
    return {name: RowVecLoad(name) for name in names}


def _scales() -> dict[str, RowVecLoad | ColVecLoad]:
    """What products of 8-bit floats are multiplied by: a number for each token and one for each channel."""
    return {"of_token": ColVecLoad("of_token"), **_rows("of_channel", "bias")}


def _turning() -> dict:
    """Norm and rotation; `rotations` holds cosine and sine by turns."""
    return {
        "rotations": rotary_cos_sin_load("rotations"),
        "rstd": HeadRstd("rstd", eps=RMSNorm.eps),
        **_rows("scale"),
    }


@gemm_epilogue(ops=_rows("bias"))
def _plain(acc, bias):
    return {"D": acc + bias}


@gemm_epilogue(ops=_scales())
def _plain_8bit(acc, of_token, of_channel, bias):
    return {"D": acc * of_token * of_channel + bias}


@gemm_epilogue(ops=_rows("bias"))
def _gelu(acc, bias):
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops=_scales())
def _gelu_8bit(acc, of_token, of_channel, bias):
    return {"D": gelu_tanh_approx(acc * of_token * of_channel + bias)}


@gemm_epilogue(ops=_rows("bias", "gate"))
def _gated(acc, c, bias, gate):
    return {"D": c + (acc + bias) * gate}


@gemm_epilogue(ops=_scales() | _rows("gate"))
def _gated_8bit(acc, c, of_token, of_channel, bias, gate):
    return {"D": c + (acc * of_token * of_channel + bias) * gate}


def _square(acc, bias):
    return {"rstd": (acc + bias) * (acc + bias)}


@gemm_epilogue(ops=_turning() | _rows("bias"), prepass=_square, prepass_outs=("rstd",), mode="acc_pair")
def _turned(acc, rotations, rstd, scale, bias):
    first, second = unpack((acc + bias) * rstd * scale)
    cos, sin = unpack(rotations)
    return {"D": pack(first * cos - second * sin, first * sin + second * cos)}


def _square_8bit(acc, of_token, of_channel, bias):
    x = acc * of_token * of_channel + bias
    return {"rstd": x * x}


@gemm_epilogue(ops=_turning() | _scales(), prepass=_square_8bit, prepass_outs=("rstd",), mode="acc_pair")
def _turned_8bit(acc, rotations, rstd, scale, of_token, of_channel, bias):
    first, second = unpack((acc * of_token * of_channel + bias) * rstd * scale)
    cos, sin = unpack(rotations)
    return {"D": pack(first * cos - second * sin, first * sin + second * cos)}


PLAIN, GELU, GATED, TURNED = (
    (_plain, _plain_8bit),
    (_gelu, _gelu_8bit),
    (_gated, _gated_8bit),
    (_turned, _turned_8bit),
)


@dataclass(frozen=True)
class Tile:
    """What a multiprocessor computes at a time.

    Attributes:
        speed: where all of them are busy, in bfloat16 and in 8 bits, to that of the first; measured on an
            H200, where it differs by 3 % from one time to the next.
        cluster: how many, over tokens and over channels, share what they read.
        pingpong: two tiles by turns, one computed while the other is written.
    """

    tokens: int
    channels: int
    speed: tuple[float, float]
    cluster: tuple[int, int] = (2, 1)
    pingpong: bool = True

    def cost(self, tokens: int, channels: int, batch: int, in_8bit: bool, processors: int) -> float:
        """Of a product: its last round takes as long as one with all processors busy."""
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
# For sums over so many channels, which hide that nothing is computed while it is written.
OF_LONG_SUMS = Tile(192, 192, (1.03, 1.03), pingpong=False)
LONG = 12288
OF_HEADS = 128  # a tile so wide holds whole ones
HEAD_SIZES = (32, 64, 128)  # those that it can be cut into


def _tile(epilogues: tuple, left: Tensor, right: Tensor) -> Tile:
    """The one with which a product is likely to be done first."""
    (batch, tokens, inner), channels = left.shape, right.shape[1]
    tiles = [*TILES, OF_LONG_SUMS] if inner >= LONG else TILES
    if epilogues is TURNED:
        tiles = [tile for tile in tiles if tile.channels % OF_HEADS == 0]
    processors = torch.cuda.get_device_properties(left.device).multi_processor_count
    in_8bit = left.dtype.itemsize == 1
    return min(tiles, key=lambda tile: tile.cost(tokens, channels, batch, in_8bit, processors))


_taken = WeakTensorKeyDictionary()  # what launches take of a matrix's rows
_plans = {}  # what quack-kernels worked out for tensors that lie alike


def _weights(linear: nn.Module, rows: slice, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Some rows of a layer's matrix, "B channels K", and the vectors that go with them, "B channels" each."""
    in_8bit = isinstance(linear, Fp8Linear)
    matrix, bias = linear.packed if in_8bit else linear.weight, linear.bias
    # By the bias too, which may have been replaced alone.
    known, key = _taken.setdefault(matrix, {}), (rows.start, rows.stop, batch, id(bias))
    if key not in known:
        # Of their data: views of the tensors themselves would keep these, and so this entry, alive.
        vectors = {"bias": bias.data[rows].expand(batch, -1)}
        if in_8bit:
            of_channel = linear.scale.expand(linear.out_features, 1)[rows, 0].contiguous()
            vectors["of_channel"] = of_channel.expand(batch, -1)
        known[key] = matrix.data[rows].expand(batch, -1, -1), vectors
    return known[key]


def _product(
    epilogues: tuple, linear: nn.Module, x: Tensor | Rounded, rows: slice, out: Tensor | None = None,
    stream: Tensor | None = None, **vectors: Tensor | int,
) -> Tensor:  # fmt: skip
    """One launch: "B N K" and some `rows` of the layer's matrix -> "B N channels", in `out` if given."""
    in_8bit = isinstance(linear, Fp8Linear)
    if in_8bit and not isinstance(x, Rounded):
        x = Rounded.of(x)
    left = x.packed if in_8bit else x
    batch, tokens, _ = left.shape
    right, own_vectors = _weights(linear, rows, batch)
    vectors |= own_vectors
    if out is None:
        out = x.new_empty(batch, tokens, right.shape[1])
    if in_8bit:
        of_token = x.scale[..., 0]
        # Each row is to begin where 16 bytes do.
        vectors["of_token"] = F.pad(of_token, (0, 4 - tokens % 4))[:, :tokens] if tokens % 4 else of_token
    epilogue, lie = epilogues[in_8bit], [x.stride() for x in (left, right, out)]
    stream_lies = None if stream is None else stream.stride()
    key = (epilogue.semantic_digest, left.shape, right.shape, left.device, *lie, stream_lies)
    plan = _plans.get(key)
    if plan is not None:
        run_gemm_epi_plan(plan, left, right, out, stream, vectors)
        return out
    tile = _tile(epilogues, left, right)
    # Eight times slower without fast sums, and no nearer to bfloat16: the numbers are rounded by more.
    more = {"post_init_attrs": (("fp8_slow_accum", False),)} if in_8bit else {}
    _plans[key] = epilogue.gemm(
        left, right, out, stream, epi_args=vectors, tile_M=tile.tokens, tile_N=tile.channels,
        cluster_M=tile.cluster[0], cluster_N=tile.cluster[1], pingpong=tile.pingpong, **more,
    )  # fmt: skip
    return out


_tables = WeakTensorKeyDictionary()


def _table(pe: Tensor) -> Tensor:
    """Cosines and sines by turns, "B N D", of the rotations "B 1 N D/2 2 2"; made once for all layers."""
    if pe not in _tables:
        # Of each pair's matrix the first column.
        _tables[pe] = pe[:, 0, :, :, :, 0].flatten(2).contiguous()
    return _tables[pe]


def _rotated(
    linear: nn.Module,
    scale: Tensor,
    x: Tensor | Rounded,
    table: Tensor,
    rows: slice,
    out: Tensor | None = None,
) -> Tensor:
    """Queries or keys or both, "B N channels", in `out` if given.

    Args:
        scale: of the norm, "channels".
        table: of all rows or of each, "1 N D" or "B N D".
    """
    more = {"rstd": table.shape[-1], "scale": scale.expand(x.shape[0] if len(table) == 1 else 1, -1)}
    if len(table) == 1:
        return _product(TURNED, linear, x, rows, out, rotations=table[0], **more)
    # A kernel has one table for all rows.
    if out is None:
        out = x.new_empty(*x.shape[:2], scale.shape[0])
    for row in range(len(table)):
        one = slice(row, row + 1)
        _product(TURNED, linear, x[one], rows, out[one], rotations=table[row], **more)
    return out


def _scale(num_heads: int, *norms: nn.Module) -> Tensor:
    """The norms' scales, each for all heads, "channels"."""
    return torch.cat([norm.scale.expand(num_heads, -1) for norm in norms]).flatten()


def _rooms(x: Tensor | Rounded, tokens: int) -> tuple[Tensor, Tensor]:
    """For queries with keys, and for values."""
    batch, _, width = x.shape
    return x.new_empty(batch, tokens, 2 * width), x.new_empty(batch, tokens, width)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """`flux.math.attend` by flash-attn-4, written to `out`, "B N C", if it is given."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if out is None:
        return _flash_attn_fwd(q, k, v)[0].flatten(2)
    _flash_attn_fwd(q, k, v, out=out.unflatten(-1, q.shape[2:]))
    return out


def _qk(linear: nn.Module, norm: QKNorm, x: Tensor | Rounded, table: Tensor, num_heads: int, out: Tensor) -> None:
    """Write normalised and rotated queries and keys to `out`, "B N 2C"."""
    scale = _scale(num_heads, norm.query_norm, norm.key_norm)
    _rotated(linear, scale, x, table, slice(0, 2 * x.shape[-1]), out)


def _q(linear: nn.Module, norm: QKNorm, x: Tensor | Rounded, table: Tensor, num_heads: int, out: Tensor) -> None:
    """Write normalised and rotated queries to `out`, "B N C"."""
    _rotated(linear, _scale(num_heads, norm.query_norm), x, table, slice(0, x.shape[-1]), out)


def _k(linear: nn.Module, norm: QKNorm, x: Tensor | Rounded, table: Tensor, num_heads: int, out: Tensor) -> None:
    """Write normalised and rotated keys to `out`, "B N C"."""
    width = x.shape[-1]
    _rotated(linear, _scale(num_heads, norm.key_norm), x, table, slice(width, 2 * width), out)


def _v(linear: nn.Module, x: Tensor | Rounded, out: Tensor) -> None:
    """Write values to `out`, "B N C"."""
    width = x.shape[-1]
    _product(PLAIN, linear, x, slice(2 * width, 3 * width), out)


def _add_gated(stream: Tensor, gate: Tensor, linear: nn.Module, x: Tensor | Rounded) -> Tensor:
    """stream + gate * linear(x), "B N C"."""
    gate = gate[:, 0].expand(stream.shape[0], -1)
    return _product(GATED, linear, x, slice(None), stream=stream.contiguous(), gate=gate)


def _inject(edit: AttentionEdit, k: Tensor, v: Tensor) -> None:
    """`AttentionEdit.inject`, in place: "B H I D" each."""
    for own, injected in zip((k, v), edit.kv or ()):
        if injected is not None and edit.kv_weight is None:
            own.copy_(injected)
        elif injected is not None:
            own.lerp_(injected, edit.kv_weight)


class HopperDoubleBlock(DoubleStreamBlock):
    """A double-stream block by fused kernels. With gradients, or on a CPU, it is the plain one."""

    def run(
        self, img: Tensor, txt: Tensor, mod: Tensor, pe: Tensor, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """See `DoubleStreamBlock.run`."""
        if not has_kernel(img):
            return super().run(img, txt, mod, pe, edit)
        img_mod1, img_mod2, txt_mod1, txt_mod2 = split_modulation(mod, 4)
        img_in = modulate(self.img_norm1, img, img_mod1, self.img_attn.qkv)
        txt_in = modulate(self.txt_norm1, txt, txt_mod1, self.txt_attn.qkv)
        img_attn, txt_attn, qkv = self.fused_attention(img_in, txt_in, pe, edit)

        img = _add_gated(img, img_mod1.gate, self.img_attn.proj, img_attn)
        hidden = _hidden(self.img_mlp[0], modulate(self.img_norm2, img, img_mod2, self.img_mlp[0]))
        img = _add_gated(img, img_mod2.gate, self.img_mlp[2], hidden)

        txt = _add_gated(txt, txt_mod1.gate, self.txt_attn.proj, txt_attn)
        hidden = _hidden(self.txt_mlp[0], modulate(self.txt_norm2, txt, txt_mod2, self.txt_mlp[0]))
        txt = _add_gated(txt, txt_mod2.gate, self.txt_mlp[2], hidden)
        return img, txt, qkv

    def fused_attention(
        self, img: Tensor | Rounded, txt: Tensor | Rounded, pe: Tensor, edit: AttentionEdit
    ) -> tuple[Tensor, Tensor, QueriesKeysValues | None]:
        """`joint_attention`, its streams projected side by side into the same tensors."""
        num_txt, width, num_heads = txt.shape[1], img.shape[-1], self.num_heads
        table, (qk, v) = _table(pe), _rooms(img, num_txt + img.shape[1])
        txt_in = self.txt_attn.qkv, self.txt_attn.norm, txt, table[:, :num_txt], num_heads
        img_in = self.img_attn.qkv, self.img_attn.norm, img, table[:, num_txt:], num_heads
        _qk(*txt_in, qk[:, :num_txt])
        _v(self.txt_attn.qkv, txt, v[:, :num_txt])
        if not edit.splits_qkv:
            _qk(*img_in, qk[:, num_txt:])
        elif not edit.whole_kv:
            _k(*img_in, qk[:, num_txt:, width:])
        if not edit.whole_kv:
            _v(self.img_attn.qkv, img, v[:, num_txt:])
        q, k, v = (split_heads(part, num_heads) for part in (*qk.chunk(2, dim=-1), v))
        _inject(edit, k[:, :, num_txt:], v[:, :, num_txt:])

        wait = edit.start_exchange(k, v)
        if edit.splits_qkv:
            _q(*img_in, qk[:, num_txt:, :width])
        attn = attend(q, *wait())
        return attn[:, num_txt:], attn[:, :num_txt], (q, k, v) if edit.record else None


class HopperSingleBlock(SingleStreamBlock):
    """A single-stream block by fused kernels. With gradients, or on a CPU, it is the plain one."""

    def run(
        self, x: Tensor, mod: Tensor, pe: Tensor, num_txt: int = 0, edit: AttentionEdit = PLAIN_EDIT
    ) -> tuple[Tensor, QueriesKeysValues | None]:
        """See `SingleStreamBlock.run`."""
        if not has_kernel(x):
            return super().run(x, mod, pe, num_txt, edit)
        (own_mod,) = split_modulation(mod, 1)
        x_in = modulate(self.pre_norm, x, own_mod, self.linear1)
        q, k, v = self.fused_qkv(x_in, pe, num_txt, edit)

        wait = edit.start_exchange(k, v)
        hidden = _hidden(self.linear1, x_in, 3 * self.hidden_dim, before=self.hidden_dim)
        attend(q, *wait(), hidden[..., : self.hidden_dim])
        x = _add_gated(x, own_mod.gate, self.linear2, hidden)
        return x, (q, k, v) if edit.record else None

    def fused_qkv(
        self, x: Tensor | Rounded, pe: Tensor, num_txt: int, edit: AttentionEdit
    ) -> QueriesKeysValues:
        """Queries, keys and values, those of `edit` injected."""
        table, width, num_heads = _table(pe), self.hidden_dim, self.num_heads
        qk, v = _rooms(x, x.shape[1])
        own = self.linear1, self.norm
        if edit.whole_kv:
            _q(*own, x, table, num_heads, qk[..., :width])
            _k(*own, x[:, :num_txt], table[:, :num_txt], num_heads, qk[:, :num_txt, width:])
            _v(self.linear1, x[:, :num_txt], v[:, :num_txt])
        else:
            _qk(*own, x, table, num_heads, qk)
            _v(self.linear1, x, v)
        q, k, v = (split_heads(part, num_heads) for part in (*qk.chunk(2, dim=-1), v))
        _inject(edit, k[:, :, num_txt:], v[:, :, num_txt:])
        return q, k, v


def _hidden(linear: nn.Module, x: Tensor | Rounded, start: int = 0, before: int = 0) -> Tensor:
    """The MLP's hidden channels after the GELU, behind uninitialised channels for attention's result.

    Args:
        linear: Projects to the hidden channels, from output channel `start` on.
        x: Input, "B N C".
        start: First of the output channels.
        before: Number of channels to leave free.
    """
    wide = x.new_empty(*x.shape[:2], before + linear.out_features - start)
    _product(GELU, linear, x, slice(start, None), wide[..., before:])
    return wide


def use_hopper(block: DoubleStreamBlock | SingleStreamBlock) -> None:
    """Turn a block into one with fused kernels, in place: the same weights, another `run`."""
    block.__class__ = HopperDoubleBlock if isinstance(block, DoubleStreamBlock) else HopperSingleBlock


def serves(block: nn.Module) -> bool:
    """Whether all products of a block can be made so: plain ones in bfloat16, or those of 8-bit floats, and
    heads of such sizes.
    """
    parts = [x for part in block.children() if not isinstance(part, Modulation) for x in part.modules()]
    return all(
        isinstance(part, Fp8Linear)
        or (isinstance(part, RMSNorm) and len(part.scale) in HEAD_SIZES)
        or (type(part) is nn.Linear and part.weight.dtype == torch.bfloat16 and part.bias is not None)
        for part in parts
        if [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    )
