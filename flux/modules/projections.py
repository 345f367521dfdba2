"""A block's products and what follows each of them: here apart, in `flux.modules.projections_hopper` as one kernel.

Shapes: B batch, N tokens, C channels, H heads, D head size.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux import math
from flux.math import Exchange, KeysValues, one_sequence
from flux.modules.linear import in_parts, project_rows
from flux.modules.ops import Rounded, norm_and_turn, norm_and_turn_one, with_gelu

if TYPE_CHECKING:
    from flux.modules.layers import SelfAttention
    from flux.modules.norms import QKNorm


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """One projection's heads apart: "B N C" -> "B H N D"."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def replaces(given: KeysValues | None, weight: Tensor | None) -> bool:
    """Whether the given keys and values leave nothing of one's own."""
    return given is not None and weight is None and all(part is not None for part in given)


def blend(own: Tensor, given: Tensor | None, weight: Tensor | None) -> Tensor:
    """One's own keys or values, "B H I D", moved towards the given ones by a weight that fits that shape."""
    if given is None:
        return own
    return given if weight is None else torch.lerp(own, given, weight)


def begun(exchange: Exchange | None, k: Tensor, v: Tensor) -> Callable[[], KeysValues]:
    """What waits for the keys and values to attend to; without an exchange one's own."""
    return exchange(k, v) if exchange else lambda: (k, v)


class Apart:
    """Each product by itself, and after it what lies between it and the next."""

    attend = staticmethod(math.attend)

    @staticmethod
    def heads(
        linear: nn.Module,
        norm: "QKNorm",
        x: Tensor | Rounded,
        pe: Tensor,
        num_heads: int,
        of_more: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and turned, and values: "B N C" -> three times "B H N D".

        Args:
            linear: its output channels are those of queries, of keys and of values.
            pe: rotations "B 1 N D/2 2 2".
            of_more: it has others behind them, which are not computed.
        """
        made = project_rows(linear, x, 0, 3 * x.shape[-1]) if of_more else linear(x)
        return _turned(norm, made, pe, num_heads)

    @classmethod
    def heads_of_both(
        cls,
        txt_attn: "SelfAttention",
        txt: Tensor | Rounded,
        img_attn: "SelfAttention",
        img: Tensor | Rounded,
        pe: Tensor,
        given: KeysValues | None,
        weight: Tensor | None,
        exchange: Exchange | None,
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[], KeysValues]]:
        """`heads` of two streams as one sequence, the text's first, and what `begun` returns.

        Args:
            given: stand in for the image's own keys and values, by a `weight` that fits "B H I D" or, without
                one, wholly; its own are then not computed if that can be helped.
            exchange: while it is under way, the image's queries are computed if that can be helped.
        """
        num_txt, num_heads = txt.shape[1], img_attn.num_heads
        own = img_attn.qkv, img_attn.norm, img, pe[:, :, num_txt:], num_heads
        txt_q, txt_k, txt_v = cls.heads(txt_attn.qkv, txt_attn.norm, txt, pe[:, :, :num_txt], num_heads)
        q, parts = None, in_parts(img_attn.qkv)
        if parts and replaces(given, weight):
            k, v = given
        elif parts and exchange:
            k, v = cls.keys_values(*own)
        else:
            q, k, v = cls.heads(*own)
        if given is not None:
            k, v = blend(k, given[0], weight), blend(v, given[1], weight)
        k, v = one_sequence(txt_k, k), one_sequence(txt_v, v)
        whole = begun(exchange, k, v)
        q = one_sequence(txt_q, cls.queries(*own) if q is None else q)
        return q, k, v, whole

    @staticmethod
    def heads_and_hidden(
        linear: nn.Module, norm: "QKNorm", x: Tensor | Rounded, pe: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`heads`, and `hidden` of the channels behind those."""
        made, width = linear(x), 3 * x.shape[-1]
        return *_turned(norm, made[..., :width], pe, num_heads), made[..., width:]

    @staticmethod
    def queries(linear: nn.Module, norm: "QKNorm", x: Tensor | Rounded, pe: Tensor, num_heads: int) -> Tensor:
        """The first of `heads` alone."""
        q = project_rows(linear, x, 0, x.shape[-1])
        return norm_and_turn_one(norm.query_norm, split_heads(q, num_heads), pe)

    @staticmethod
    def keys_values(
        linear: nn.Module, norm: "QKNorm", x: Tensor | Rounded, pe: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor]:
        """The others of `heads`."""
        width = x.shape[-1]
        made = project_rows(linear, x, width, 3 * width)
        k, v = (split_heads(part, num_heads) for part in made.chunk(2, dim=-1))
        return norm_and_turn_one(norm.key_norm, k, pe), v

    @staticmethod
    def hidden(linear: nn.Module, x: Tensor | Rounded, start: int = 0) -> Tensor:
        """The MLP's inner channels, from `start` on, as `contracted` takes them."""
        return project_rows(linear, x, start) if start else linear(x)

    @staticmethod
    def room(hidden: Tensor, width: int) -> Tensor | None:
        """Where attention's result, of so many channels, is to be written; None: anywhere."""
        return None

    @staticmethod
    def contracted(
        stream: Tensor, gate: Tensor, linear: nn.Module, hidden: Tensor, mixed: Tensor | None = None
    ) -> Tensor:
        """The stream, "B N C", and on it the gated product of attention's result, if any, and behind it the
        GELU of `hidden`.

        Args:
            gate: "B 1 C" or "1 1 C".
        """
        return torch.addcmul(stream, gate, linear(with_gelu(mixed, hidden, linear)))

    @staticmethod
    def added(stream: Tensor, gate: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
        """The stream, "B N C", and on it the gated product of `x`."""
        return torch.addcmul(stream, gate, linear(x))


def _turned(norm: "QKNorm", qkv: Tensor, pe: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (split_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    return *norm_and_turn(norm, q, k, v, pe), v
