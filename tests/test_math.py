"""Attention and rotary embedding, against the formulas written with complex numbers and an explicit
softmax.
"""

import math

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from helpers import tiny_models
from torch.testing import assert_close

from flux.math import apply_rope, attend, attention, rope


def positions(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 200, (batch, tokens), generator=torch.Generator().manual_seed(0)).float()


def test_rope_holds_rotation_matrices():
    """Each 2x2 matrix turns by position / theta ** (2 j / dim); far positions lose nothing to float32."""
    pos = positions(2, 5)
    matrices = rope(pos, 8, 10_000)
    assert matrices.shape == (2, 5, 4, 2, 2)
    assert matrices.dtype == torch.float32
    for j in range(4):
        angle = pos.double() / 10_000 ** (2 * j / 8)
        expected = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(
            -1, (2, 2)
        )
        assert_close(matrices[:, :, j], expected.float(), rtol=0, atol=1e-7)


def test_rope_equals_diffusers():
    pos = positions(1, 7)
    cos, sin = get_1d_rotary_pos_embed(
        6, pos[0], theta=10_000, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
    )
    matrices = rope(pos, 6, 10_000)[0]
    assert_close(matrices[..., 0, 0], cos[:, ::2], rtol=0, atol=1e-7)
    assert_close(matrices[..., 1, 0], sin[:, ::2], rtol=0, atol=1e-7)


def test_apply_rope_turns_neighbouring_channels():
    """Channels 2 j and 2 j + 1 form a pair; halves of the head instead of neighbours would load and be
    noise.
    """
    ids = torch.stack([positions(2, 5)] * 3, dim=-1)
    pe = torch.cat([rope(ids[..., i], n, 10_000) for i, n in enumerate(tiny_models.PARAMS.axes_dim)], dim=-3)[
        :, None
    ]
    q, k = torch.randn(2, 3, 2, 5, 16, generator=torch.Generator().manual_seed(1))[:, :2]
    for got, x in zip(apply_rope(q, k, pe), (q, k)):
        assert_close(got, tiny_models.hand_rotation(x, ids, tiny_models.PARAMS), rtol=0, atol=1e-6)


def test_apply_rope_keeps_each_dtype():
    pe = rope(positions(1, 4), 8, 10_000)[:, None]
    x = torch.randn(1, 2, 4, 8)
    q, k = apply_rope(x.bfloat16(), x, pe)
    assert q.dtype == torch.bfloat16
    assert k.dtype == torch.float32


def test_attention_is_the_softmax_formula():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 8, generator=generator)
    weights = torch.softmax(q @ k.mT / math.sqrt(8), dim=-1)
    assert_close(attend(q, k, v), (weights @ v).transpose(1, 2).reshape(2, 5, 24), rtol=0, atol=1e-6)


def test_attention_knows_positions_by_their_distance_only():
    """Upstream's `attention(q, k, v, pe)`: the same shift of all positions leaves it unchanged."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=generator)
    near, far = (rope(torch.arange(6.0)[None] + start, 8, 10_000)[:, None] for start in (0, 50))
    assert_close(attention(q, k, v, near), attention(q, k, v, far), rtol=0, atol=2e-6)
    assert not torch.allclose(attention(q, k, v, near), attend(q, k, v), atol=1e-2)
