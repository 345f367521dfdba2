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

from flux.modules.layers import Modulation
from flux.modules.linear import Fp8Linear
from flux.modules.norms import RMSNorm
from flux.modules.ops import Rounded
from flux.modules.projections import Apart, begun, replaces, split_heads

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


class Joined(Apart):
    """As `Apart`, each product with what follows it."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        place = None if out is None else out.unflatten(-1, q.shape[2:])
        mixed = _flash_attn_fwd(q, k, v, out=place)[0]
        return mixed.flatten(2) if out is None else out

    @classmethod
    def heads(cls, linear, norm, x, pe, num_heads, of_more=False):
        return cls._heads(linear, norm, x, _table(pe), num_heads, *_rooms(x, x.shape[1]))

    @staticmethod
    def _heads(linear, norm, x, table, num_heads, qk, v):
        """`heads`, written to "B N 2C" and "B N C"."""
        width, scale = x.shape[-1], _scale(num_heads, norm.query_norm, norm.key_norm)
        _rotated(linear, scale, x, table, slice(0, 2 * width), qk)
        _product(PLAIN, linear, x, slice(2 * width, 3 * width), v)
        return tuple(split_heads(part, num_heads) for part in (*qk.chunk(2, dim=-1), v))

    @classmethod
    def heads_of_both(cls, txt_attn, txt, img_attn, img, pe, given, weight, exchange):
        num_txt, num_heads, width = txt.shape[1], img_attn.num_heads, img.shape[-1]
        table, (qk, v) = _table(pe), _rooms(img, num_txt + img.shape[1])
        of_txt = txt_attn.qkv, txt_attn.norm, txt, table[:, :num_txt], num_heads
        cls._heads(*of_txt, qk[:, :num_txt], v[:, :num_txt])
        own_qk, own_v, replaced = qk[:, num_txt:], v[:, num_txt:], replaces(given, weight)
        own = img_attn.qkv, img_attn.norm, img, table[:, num_txt:], num_heads
        if exchange and not replaced:
            cls._keys_values(*own, own_qk[..., width:], own_v)
        elif not replaced:
            cls._heads(*own, own_qk, own_v)
        q, k, v = (split_heads(part, num_heads) for part in (*qk.chunk(2, dim=-1), v))
        for place, other in zip((k[:, :, num_txt:], v[:, :, num_txt:]), given or ()):
            if other is not None:
                place.copy_(other) if weight is None else place.lerp_(other, weight)
        whole = begun(exchange, k, v)
        if exchange or replaced:
            cls._queries(*own, own_qk[..., :width])
        return q, k, v, whole

    @classmethod
    def heads_and_hidden(cls, linear, norm, x, pe, num_heads):
        return *cls.heads(linear, norm, x, pe, num_heads), cls.hidden(linear, x, 3 * x.shape[-1])

    @classmethod
    def queries(cls, linear, norm, x, pe, num_heads):
        return cls._queries(linear, norm, x, _table(pe), num_heads)

    @staticmethod
    def _queries(linear, norm, x, table, num_heads, out=None):
        """`queries`, written to "B N C" if that is given."""
        scale = _scale(num_heads, norm.query_norm)
        return split_heads(_rotated(linear, scale, x, table, slice(0, x.shape[-1]), out), num_heads)

    @classmethod
    def keys_values(cls, linear, norm, x, pe, num_heads):
        return cls._keys_values(linear, norm, x, _table(pe), num_heads)

    @staticmethod
    def _keys_values(linear, norm, x, table, num_heads, k=None, v=None):
        """`keys_values`, written to "B N C" twice if those are given."""
        width, scale = x.shape[-1], _scale(num_heads, norm.key_norm)
        k = _rotated(linear, scale, x, table, slice(width, 2 * width), k)
        v = _product(PLAIN, linear, x, slice(2 * width, 3 * width), v)
        return split_heads(k, num_heads), split_heads(v, num_heads)

    @staticmethod
    def hidden(linear, x, start=0):
        """After the GELU; with a `start`, behind `room` for attention's result."""
        before = x.shape[-1] if start else 0
        wide = x.new_empty(*x.shape[:2], before + linear.out_features - start)
        _product(GELU, linear, x, slice(start, None), wide[..., before:])
        return wide

    @staticmethod
    def room(hidden, width):
        return hidden[..., :width]

    @classmethod
    def contracted(cls, stream, gate, linear, hidden, mixed=None):
        return cls.added(stream, gate, linear, hidden)

    @staticmethod
    def added(stream, gate, linear, x):
        gate = gate[:, 0].expand(stream.shape[0], -1)
        return _product(GATED, linear, x, slice(None), stream=stream.contiguous(), gate=gate)


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
