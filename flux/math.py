"""Attention and the rotary embedding of positions.

One legend of shapes for the whole package: B batch, T text tokens, I image tokens, N = T + I, H heads, D head
    size, C = H D channels.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

KeysValues = tuple[Tensor, Tensor]
"""Keys (after QK-norm and rotary embedding) and values of the image tokens in one layer, "B H I D" each."""
Exchange = Callable[[Tensor, Tensor], Callable[[], KeysValues]]
"""Where tokens are shared out: begins to bring together keys and values, "B H n D" each of one's own tokens,
and returns what waits for those of all, "B H N D" each.
"""


def rope(pos: Tensor, dim: int, theta: int) -> Tensor:
    """Rotation matrices of the positions along one axis (RoFormer, arXiv 2104.09864, section 3.2).

    Args:
        pos: positions, "B N".
        dim: even number of channels that this axis turns; channel pair j turns by pos / theta ** (2 j / dim).

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
    """Turns queries and keys ("B H N D") by the rotations `pe` ("B 1 N D/2 2 2"); shapes and dtypes stay."""
    return rotate(q, pe), rotate(k, pe)


def rotate(x: Tensor, pe: Tensor) -> Tensor:
    """One tensor of `apply_rope`."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    turned = pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]
    return turned.flatten(-2).type_as(x)


def one_sequence(txt: Tensor, img: Tensor) -> Tensor:
    """Heads of both streams, "B H T D" and "B H I D", as "B H N D".

    In memory "B N H D", as projections leave them, so that long runs are copied.
    """
    return torch.cat((txt.transpose(1, 2), img.transpose(1, 2)), dim=1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
    """Softmax attention over all tokens: "B H N D" three times -> "B N C", in `out` if that is given."""
    mixed = rearrange(scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
    return mixed if out is None else out.copy_(mixed)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor) -> Tensor:
    """`attend` after turning queries and keys by `pe`: "B H N D" three times -> "B N C"."""
    return attend(*apply_rope(q, k, pe), v)
