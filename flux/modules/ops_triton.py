"""Triton kernels for the operations between a block's linear layers, each one pass over memory.

`flux.modules.ops` has the same in plain PyTorch, and decides which of them is used. There are no gradients.
"""

# Kernels are in Triton's own language, and its stubs do not know that a launch may leave out parameters.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false
# ruff: noqa: N803  (constants of a kernel are in capitals)

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux.modules.float8 import E4M3, E4M3_MAX

LARGEST = tl.constexpr(E4M3_MAX)
HEADS = 8  # heads that are computed at once


@triton.jit
def _norm_rotate(x, scale, a, b, c, d, dtype, EPS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1)[:, None] / SIZE + EPS) * scale
    # As in plain PyTorch, the norm is rounded before the rotation.
    first, second = tl.split(tl.reshape(x.to(dtype).to(tl.float32), (HEADS, SIZE // 2, 2)))
    return tl.reshape(tl.join(a * first + b * second, c * first + d * second), (HEADS, SIZE)).to(dtype)


@triton.jit
def _qk_norm_rope(
    q, k, from_row, from_token, from_head, new_q, new_k, to_row, to_token, to_head, q_scale, k_scale,
    rotations, rotations_row, NUM_HEADS: tl.constexpr, EPS: tl.constexpr, SIZE: tl.constexpr,
    HEADS: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, SIZE)
    # One rotation serves all heads of a token.
    matrix = rotations + row * rotations_row + token * (2 * SIZE) + tl.arange(0, SIZE // 2) * 4
    a, b = tl.load(matrix)[None, :], tl.load(matrix + 1)[None, :]
    c, d = tl.load(matrix + 2)[None, :], tl.load(matrix + 3)[None, :]
    of_q = tl.load(q_scale + channel).to(tl.float32)[None, :]
    if BOTH:
        of_k = tl.load(k_scale + channel).to(tl.float32)[None, :]
    dtype = new_q.dtype.element_ty
    for start in tl.static_range(0, NUM_HEADS, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < NUM_HEADS)[:, None]
        source = row * from_row + token * from_token + head[:, None] * from_head + channel[None, :]
        target = row * to_row + token * to_token + head[:, None] * to_head + channel[None, :]
        own_q = tl.load(q + source, mask=inside)
        tl.store(new_q + target, _norm_rotate(own_q, of_q, a, b, c, d, dtype, EPS, HEADS, SIZE), mask=inside)
        if BOTH:
            own_k = tl.load(k + source, mask=inside)
            tl.store(
                new_k + target, _norm_rotate(own_k, of_k, a, b, c, d, dtype, EPS, HEADS, SIZE), mask=inside
            )


def qk_norm_rope(
    q: Tensor, k: Tensor, q_scale: Tensor, k_scale: Tensor, eps: float, pe: Tensor
) -> tuple[Tensor, Tensor]:
    """RMS-normalise queries and keys per head and rotate them.

    Args:
        q: Queries, "B H N D", D a power of two, contiguous along D.
        k: Keys, with the shape and strides of `q`.
        q_scale: Scale of the queries' norm, "D".
        k_scale: Scale of the keys' norm, "D".
        eps: Added to the mean square.
        pe: Rotations "B 1 N D/2 2 2" or "1 1 N D/2 2 2", float32.

    Returns:
        Queries and keys, "B H N D" each, in memory "B N H D".
    """
    new_q, new_k = _heads_like(q), _heads_like(q)
    _launch_norm_rope(q, k, new_q, new_k, q_scale, k_scale, eps, pe)
    return new_q, new_k


def norm_rope(x: Tensor, scale: Tensor, eps: float, pe: Tensor) -> Tensor:
    """The same for queries or keys alone."""
    result = _heads_like(x)
    _launch_norm_rope(x, None, result, None, scale, None, eps, pe)
    return result


def _heads_like(x: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    return x.new_empty(batch, tokens, heads, size).transpose(1, 2)


def _launch_norm_rope(
    q: Tensor, k: Tensor | None, new_q: Tensor, new_k: Tensor | None, q_scale: Tensor,
    k_scale: Tensor | None, eps: float, pe: Tensor,
) -> None:  # fmt: skip
    batch, heads, tokens, size = q.shape
    pe = pe.contiguous()
    strides = [x.stride(axis) for x in (q, new_q) for axis in (0, 2, 1)]
    _qk_norm_rope[(tokens, batch)](
        q, k, *strides[:3], new_q, new_k, *strides[3:], q_scale, k_scale,
        pe, 0 if pe.shape[0] == 1 else pe.stride(0), heads, eps, size, HEADS, k is not None,
        num_warps=2,
    )  # fmt: skip


@triton.jit
def _write(x, largest, result, scales, row, place, inside, ROUND: tl.constexpr):
    if ROUND:
        scale = tl.maximum(largest, 1e-12) / LARGEST
        tl.store(scales + row, scale)
        x = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    tl.store(result + place, x.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _norm_modulate(
    x, x_row, shift, scale, mod_row, tokens, result, scales,
    WIDTH: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = channel < WIDTH
    x = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, axis=0) / WIDTH, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + EPS)
    own = row // tokens * mod_row + channel
    x = x * (1 + tl.load(scale + own, mask=inside, other=0.0).to(tl.float32))
    x = x + tl.load(shift + own, mask=inside, other=0.0).to(tl.float32)
    _write(x, tl.max(tl.abs(x), axis=0), result, scales, row, row * WIDTH + channel, inside, ROUND)


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, rounding: bool
) -> tuple[Tensor, Tensor]:
    """(1 + scale) * layer_norm(x) + shift, in e4m3 if `rounding`.

    Args:
        x: "B N C".
        shift: "B 1 C" or "1 1 C".
        scale: With the shape and strides of `shift`.
        eps: Added to the variance.
        rounding: Whether to round to e4m3, with a scale for each row.

    Returns:
        "B N C", and the scales, "B N 1". Without rounding there are none: "B 0 1".
    """
    tokens, width = x.shape[1:]
    rows = x.flatten(0, 1)
    result, scales = _results(x, width, rounding)
    _norm_modulate[(rows.shape[0],)](
        rows, rows.stride(0), shift, scale, 0 if shift.shape[0] == 1 else shift.stride(0), tokens,
        result, scales, width, eps, triton.next_power_of_2(width), rounding, num_warps=2,
    )  # fmt: skip
    return result, scales


@triton.jit
def _concat_gelu(
    mixed, mixed_row, hidden, hidden_row, result, scales,
    MIXED: tl.constexpr, HIDDEN: tl.constexpr, MIXED_BLOCK: tl.constexpr, HIDDEN_BLOCK: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place, largest = row * (MIXED + HIDDEN), 0.0
    first, second = tl.arange(0, MIXED_BLOCK), tl.arange(0, HIDDEN_BLOCK)
    if HIDDEN > 0:
        y = tl.load(hidden + row * hidden_row + second, mask=second < HIDDEN, other=0.0).to(tl.float32)
        # x / 2 (1 + tanh(z)) = x sigmoid(2 z), with z = sqrt(2 / pi) (x + 0.044715 x^3)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        largest = tl.max(tl.abs(y), axis=0)
    if MIXED > 0:
        x = tl.load(mixed + row * mixed_row + first, mask=first < MIXED, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
        _write(x, largest, result, scales, row, place + first, first < MIXED, ROUND)
    if HIDDEN > 0:
        _write(y, largest, result, scales, row, place + MIXED + second, second < HIDDEN, ROUND)


def concat_gelu(x: Tensor | None, hidden: Tensor | None, rounding: bool) -> tuple[Tensor, Tensor]:
    """Concatenate `x` and the GELU (tanh) of `hidden` along the channels, in e4m3 if `rounding`.

    Args:
        x: "B N C" or None.
        hidden: "B N M", or None if `x` is given.
        rounding: Whether to round to e4m3, with a scale for each row.

    Returns:
        "B N C+M", and the scales, "B N 1". Without rounding there are none: "B 0 1".

    Raises:
        ValueError: Both are None.
    """
    like = hidden if x is None else x
    if like is None:
        raise ValueError("Got neither x nor hidden: give one of them")
    rows = [(like if part is None else part).flatten(0, 1) for part in (x, hidden)]
    widths = [0 if part is None else part.shape[-1] for part in (x, hidden)]
    result, scales = _results(like, sum(widths), rounding)
    blocks = [triton.next_power_of_2(max(1, width)) for width in widths]
    _concat_gelu[(like.shape[0] * like.shape[1],)](
        rows[0], rows[0].stride(-2), rows[1], rows[1].stride(-2), result, scales, *widths, *blocks, rounding,
        num_warps=2 if sum(widths) <= 4096 else 8,
    )  # fmt: skip
    return result, scales


@triton.jit
def _copy_tokens(
    x, x_row, x_token, places, out, out_row, out_token, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token, row, channel = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    inside, place = channel < WIDTH, tl.load(places + token)
    values = tl.load(x + row * x_row + place * x_token + channel, mask=inside)
    tl.store(out + row * out_row + token * out_token + channel, values, mask=inside)


def copy_tokens(x: Tensor, places: Tensor, out: Tensor) -> None:
    """Copy the tokens at `places`, "n", of `x`, "B N C", to `out`, "B n C". Channels lie side by side."""
    batch, tokens, width = out.shape
    _copy_tokens[(tokens, batch)](
        x, x.stride(0), x.stride(1), places, out, out.stride(0), out.stride(1), width,
        triton.next_power_of_2(width),
    )  # fmt: skip


def _results(x: Tensor, width: int, rounding: bool) -> tuple[Tensor, Tensor]:
    batch, tokens = x.shape[:2]
    result = torch.empty(batch, tokens, width, dtype=E4M3 if rounding else x.dtype, device=x.device)
    # Without rounding nothing is written to the scales.
    return result, torch.empty(batch, tokens if rounding else 0, 1, device=x.device)
