"""Linear layers of a block together with the operations beside them: norm and modulation, heads, GELU.

`flux.modules.projections_hopper` has faster ones for Hopper GPUs.
"""

from torch import Tensor, nn

from flux.math import KeysValues, QueriesKeysValues
from flux.modules.linear import AnyLinear, CustomLinear, project_rows
from flux.modules.norms import ModulationOut, QKNorm
from flux.modules.ops import Rounded, concat_gelu, norm_modulate, norm_rope, qk_norm_rope


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split a projection into its heads: "B N C" -> "B H N D"."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def modulate(norm: nn.LayerNorm, x: Tensor, mod: ModulationOut, linear: nn.Module) -> Tensor | Rounded:
    """(1 + scale) * norm(x) + shift, "B N C", in the number format that `linear` takes."""
    return norm_modulate(x, mod.shift, mod.scale, norm.eps, _takes_rounded(linear))


def feed_forward(mlp: nn.Sequential, x: Tensor | Rounded) -> Tensor:
    """`mlp(x)`: a linear layer, GELU and another linear layer, "B N C" -> "B N C"."""
    expand, _, contract = mlp
    return gelu_linear(contract, expand(x))


def gelu_linear(linear: nn.Module, hidden: Tensor, attn: Tensor | None = None) -> Tensor:
    """`linear` of `attn`, if it is given, and GELU(hidden) side by side: "B N C" and "B N M" -> "B N C"."""
    return linear(concat_gelu(attn, hidden, _takes_rounded(linear)))


def qkv_heads(qkv: Tensor, norm: QKNorm, pe: Tensor, num_heads: int) -> QueriesKeysValues:
    """Normalised and rotated queries and keys, and values: "B N 3C" -> three times "B H N D".

    Args:
        qkv: Projections to queries, keys and values side by side.
        norm: Normalises queries and keys.
        pe: Rotations, "B 1 N D/2 2 2".
        num_heads: Number of heads, H.
    """
    q, k, v = (split_heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    q, k = qk_norm_rope(q, k, norm.query_norm.scale, norm.key_norm.scale, norm.query_norm.eps, pe)
    return q, k, v


def q_heads(linear: AnyLinear, norm: QKNorm, x: Tensor | Rounded, pe: Tensor, num_heads: int) -> Tensor:
    """The queries of `qkv_heads` alone, from the first C output channels of `linear`."""
    q = split_heads(project_rows(linear, x, 0, x.shape[-1]), num_heads)
    return norm_rope(q, norm.query_norm.scale, norm.query_norm.eps, pe)


def kv_heads(linear: AnyLinear, norm: QKNorm, x: Tensor | Rounded, pe: Tensor, num_heads: int) -> KeysValues:
    """The keys and values of `qkv_heads` alone, from the next 2C output channels of `linear`."""
    width = x.shape[-1]
    kv = project_rows(linear, x, width, 3 * width)
    k, v = (split_heads(part, num_heads) for part in kv.chunk(2, dim=-1))
    return norm_rope(k, norm.key_norm.scale, norm.key_norm.eps, pe), v


def _takes_rounded(linear: nn.Module) -> bool:
    return isinstance(linear, CustomLinear) and linear.takes_rounded
