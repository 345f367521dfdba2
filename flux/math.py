"""Attention, the rotary embedding of positions, and what an intervention changes in one layer's attention.

Shapes, in the whole package: B batch, T text tokens, I image tokens, J tokens of context images, N = T + I +
J, H heads, D head size, C = H D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[Tensor, Tensor]
"""Keys (after QK-norm and rotary embedding) and values of some tokens in one layer, "B H n D" each."""
PartialKeysValues = tuple[Tensor | None, Tensor | None]
"""Keys and values, of which either may be missing."""
Parts = tuple[Tensor, ...]
"""Keys and values of some tokens in one layer, as `KeysValues`, and their queries if those are kept too."""
PartialParts = tuple[Tensor | None, ...]
"""The same, of which any may be missing."""
QueriesKeysValues = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of all tokens in one layer, "B H N D" each, as attention uses them."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention: queries, keys and values, "B H n D" each, to "B n C"."""


class Exchange(Protocol):
    """The exchange between processes in one layer, if they share the tokens."""

    @property
    def most_tokens(self) -> int:
        """The largest number of tokens that one process computes."""
        ...

    @property
    def kind(self) -> tuple:
        """Equal for exchanges that move the same numbers of tokens."""
        ...

    def __call__(self, k: Tensor, v: Tensor) -> Callable[[], KeysValues]:
        """Start to gather keys and values; return a function that waits for them.

        In go those of this process's tokens, "B H n D" each. Out come those of all tokens, "B H N D" each.
        """
        ...

    def mean_of_context(self, x: Tensor) -> Tensor:
        """The mean of all context tokens, "B H 1 D", from this process's, "B H n D"."""
        ...

    def without_context(self, x: Tensor) -> Tensor:
        """Gathered keys or values, "B H N D", without those of the context tokens, "B H N-J D"."""
        ...


class TokenCounts(NamedTuple):
    """The number of tokens of each kind, in the order in which they stand in a sequence.

    Attributes:
        txt: Text tokens of the prompt.
        image_txt: Text tokens of an image (Redux). To blocks, they are text as well.
        img: Noise tokens.
        context: Context tokens. To blocks, they belong to the image stream as well.
    """

    txt: int
    image_txt: int
    img: int
    context: int


def rope(pos: Tensor, dim: int, theta: int) -> Tensor:
    """Rotation matrices of the positions along one axis (RoFormer, arXiv 2104.09864, section 3.2).

    Args:
        pos: Positions, "B N".
        dim: Even number of channels that this axis rotates.
        theta: Base of the frequencies. Channel pair j rotates by pos / theta ** (2 j / dim).

    Returns:
        float32, "B N dim/2 2 2".
    """
    # Apple's GPUs have no float64; everywhere else the angles are exact to float32.
    wide = torch.float32 if pos.device.type == "mps" else torch.float64
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=wide, device=pos.device) / dim)
    angle = pos.to(wide).unsqueeze(-1) * frequency
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((cos, -sin, sin, cos), dim=-1)
    return rearrange(matrix, "b n d (i j) -> b n d i j", i=2, j=2).float()


def apply_rope(q: Tensor, k: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys ("B H N D") by `pe` ("B 1 N D/2 2 2"). Shapes and dtypes stay."""
    return rotate(q, pe), rotate(k, pe)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate one tensor, "B H N D", by `pe`, "B 1 N D/2 2 2"."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    rotated = pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]
    return rotated.flatten(-2).type_as(x)


def join_streams(*streams: Tensor) -> Tensor:
    """Join the heads of several streams, "B H n D" each, to one sequence, "B H N D", text first.

    In memory it is "B N H D", as projections leave it, so that long runs are copied.
    """
    return torch.cat([x.transpose(1, 2) for x in streams], dim=1).transpose(1, 2)


def choose_tokens(x: Tensor, places: Tensor) -> Tensor:
    """The heads of the tokens at these places, "B H N D" -> "B H n D", in memory "B n H D"."""
    return x.transpose(1, 2).index_select(1, places).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over all tokens: three times "B H N D" -> "B N C"."""
    return rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """Rotate queries and keys by `pe`, then attend: three times "B H N D" -> "B N C"."""
    return attend(*apply_rope(q, k, pe), v)


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """The change that an intervention makes in one layer's attention. The empty edit changes nothing.

    Attributes:
        kv: Image keys and values to inject, "B H I D" each. If one of them is None, the layer's own stay.
        queries: Image queries to inject, "B H I D". If None, the layer's own stay.
        kv_weight: How far all of these replace the layer's own, 0..1, in a shape that broadcasts to "B H I
            D". If None, they replace them wholly.
        num_context: Number of context tokens that this pass computes, J, which come last.
        context_kv: Keys and values of all context tokens, "B H J D" each, in place of the layer's own. If
            None, the layer's own stay.
        context_strength: Scale of the context's keys about their mean, "1 1 1 1". If None, they stay.
        hides_context: Whether text and noise tokens do not attend to the context tokens.
        record: Whether the block returns the queries, keys and values that it computed or injected.
        others: Keys and values of another pass, "B H I D" each. The image tokens that this pass does not
            compute are taken from them. If None, it computes all of them.
        other_places: Places of these tokens in `others`.
        exchange: Gathers the keys and values of all tokens, if processes share them.
    """

    kv: PartialKeysValues | None = None
    queries: Tensor | None = None
    kv_weight: Tensor | None = None
    num_context: int = 0
    context_kv: KeysValues | None = None
    context_strength: Tensor | None = None
    hides_context: bool = False
    record: bool = False
    others: KeysValues | None = None
    other_places: Tensor | None = None
    exchange: Exchange | None = None

    @property
    def whole_kv(self) -> KeysValues | None:
        """The injected keys and values, if nothing of the layer's own is left; otherwise None."""
        if self.kv is None or self.kv_weight is not None or self.num_context:
            return None
        k, v = self.kv
        return None if k is None or v is None else (k, v)

    @property
    def splits_qkv(self) -> bool:
        """Whether queries are projected apart from keys and values.

        Keys and values may not be needed at all, or early, so that their exchange runs beside the queries.
        """
        return self.exchange is not None or self.whole_kv is not None

    @property
    def changes_kv(self) -> bool:
        """Whether any of the image stream's own keys and values change."""
        changes_context = self.context_kv is not None or self.context_strength is not None
        return self.kv is not None or (self.num_context > 0 and changes_context)

    def inject(self, k: Tensor, v: Tensor) -> KeysValues:
        """Move the layer's own image keys and values to the injected ones (Stable Flow, section 3.2).

        They become own + weight * (injected - own). Those of the context are replaced, or its keys are scaled
        about their mean.

        Args:
            k: Keys of the image stream, "B H I+J D".
            v: Its values, likewise.

        Returns:
            Keys and values in the shapes of `k` and `v`.
        """
        if not (self.num_context and self.changes_kv):
            return self._blend_both(k, v)
        sizes = k.shape[2] - self.num_context, self.num_context
        (img_k, context_k), (img_v, context_v) = k.split(sizes, dim=2), v.split(sizes, dim=2)
        if self.context_kv is not None:
            context_k, context_v = self.context_kv
        elif self.context_strength is not None:
            context_k = self.scale_context(context_k, self.context_strength)
        img_k, img_v = self._blend_both(img_k, img_v)
        return join_streams(img_k, context_k), join_streams(img_v, context_v)

    def scale_context(self, k: Tensor, strength: Tensor) -> Tensor:
        """The context's keys, "B H J D", scaled about their mean: mean + strength * (key - mean)."""
        mean = self.exchange.mean_of_context(k) if self.exchange else k.mean(dim=2, keepdim=True)
        return torch.lerp(mean, k, strength)

    def inject_queries(self, q: Tensor) -> Tensor:
        """Move the layer's own image queries to the injected ones, as `inject` does with keys and values.

        Args:
            q: Queries of the image stream, "B H I+J D". The context's stay.
        """
        if self.queries is None:
            return q
        img, context = q.split((q.shape[2] - self.num_context, self.num_context), dim=2)
        return join_streams(self._blend(img, self.queries), context)

    def _blend_both(self, k: Tensor, v: Tensor) -> KeysValues:
        if self.kv is None:
            return k, v
        return self._blend(k, self.kv[0]), self._blend(v, self.kv[1])

    def _blend(self, own: Tensor, injected: Tensor | None) -> Tensor:
        if injected is None:
            return own
        return injected if self.kv_weight is None else torch.lerp(own, injected, self.kv_weight)

    def gather(self, k: Tensor, v: Tensor) -> Callable[[], KeysValues]:
        """Start to gather the keys and values of all tokens; return a function that waits for them.

        `k` and `v` are those that this process computes, "B H n D". Behind them come the tokens that are not
        computed: image tokens, then the context's. If processes share the tokens, those of all are gathered.
        Attention gives the same in any order.
        """
        keys, values = [k], [v]
        if self.others is not None and self.other_places is not None:
            for parts, other in zip((keys, values), self.others):
                parts.append(choose_tokens(other, self.other_places))
        # Processes gather the same tokens in all layers, hidden or not.
        hidden = self.hides_context and self.exchange is None
        if self.context_kv is not None and not (self.num_context or hidden):
            for parts, context in zip((keys, values), self.context_kv):
                parts.append(context)
        if len(keys) > 1:
            k, v = join_streams(*keys), join_streams(*values)
        return self.exchange(k, v) if self.exchange else lambda: (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: Attend = attend) -> Tensor:
        """Let the queries attend to what they may, "B H n D" -> "B n C".

        Args:
            q: Queries of the computed tokens, context last.
            k: Keys of these tokens, then of all others.
            v: Their values.
            kernel: Softmax attention over all keys that it is given.
        """
        if not self.hides_context or (self.num_context == 0 and self.exchange is None):
            return kernel(q, k, v)
        seen, all_own = q.shape[2] - self.num_context, q.shape[2]
        if self.exchange:
            visible = self.exchange.without_context(k), self.exchange.without_context(v)
        else:
            visible = [join_streams(x[:, :, :seen], x[:, :, all_own:]) for x in (k, v)]
        attn = kernel(q[:, :, :seen], *visible)
        if self.num_context == 0:
            return attn
        return torch.cat((attn, kernel(q[:, :, seen:], k, v)), dim=1)


PLAIN = AttentionEdit()
