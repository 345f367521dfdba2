"""Expand GGUF's packed matrices with torch.

A packed matrix has rows of blocks. A block holds 32 or 256 numbers of a few bits each, and their scales and
minima in half precision. Results equal those of the reference decoder, ggml's `gguf` package, bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Numbers in a block and bytes of a block, by kind.
BLOCKS = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}

# Where a block's half-precision numbers begin: its scale, and its minimum if it has one.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
EXPONENT = 0x7C  # bits of a half-precision number's second byte; all are set if it is NaN or infinite


def is_finite(packed: Tensor, kind: str) -> Tensor:
    """Whether all numbers are finite, as one bool. It reads the blocks' half-precision numbers alone."""
    blocks = packed.unflatten(-1, (-1, BLOCKS[kind][1]))
    second = blocks[..., [at + 1 for at in HALVES[kind]]]
    return ((second & EXPONENT) != EXPONENT).all()


def expand(packed: Tensor, kind: str) -> Tensor:
    """Expand packed rows, "rows bytes" in uint8, to float32, "rows columns".

    Args:
        packed: Whole rows of blocks.
        kind: One of `BLOCKS`.
    """
    _, block_bytes = BLOCKS[kind]
    blocks = packed.unflatten(-1, (-1, block_bytes))
    return _EXPAND[kind](blocks).reshape(*packed.shape[:-1], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at byte `at` of each block, as float32, "... 1"."""
    return blocks[..., at : at + 2].view(torch.float16).float()


def _fields(x: Tensor, bits: int, groups: int = 1) -> Tensor:
    """Cut bytes into fields of 1, 2 or 4 bits. In each group the lowest fields of all bytes come first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)[:, None]
    return ((x.unflatten(-1, (groups, 1, -1)) >> shifts) & (2**bits - 1)).flatten(-3)


def _signed(x: Tensor, zero: int) -> Tensor:
    """Subtract `zero` from small unsigned numbers."""
    return x.view(torch.int8) - zero


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * _signed(_fields(b[..., 2:], 4), 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _fields(b[..., 4:], 4) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * _signed(_fields(b[..., 6:], 4) | _fields(b[..., 2:6], 1, groups=4) << 4, 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_fields(b[..., 8:], 4) | _fields(b[..., 4:8], 1, groups=4) << 4) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[..., 2:].view(torch.int8)


def _by_group(scales: Tensor, x: Tensor) -> Tensor:
    """Multiply each group by its scale: "... groups" times "... block" gives "... groups width"."""
    return scales[..., None] * x.unflatten(-1, (scales.shape[-1], -1))


def _q2_k(b: Tensor) -> Tensor:
    scales = b[..., :16]
    x = _by_group(_half(b, 80) * (scales & 15), _fields(b[..., 16:80], 2, groups=2))
    return x - (_half(b, 82) * (scales >> 4))[..., None]


def _q3_k(b: Tensor) -> Tensor:
    low, high = _fields(b[..., 96:104], 4), _fields(b[..., 104:108], 2)
    scales = _half(b, 108) * _signed(low | high << 4, 32)
    return _by_group(scales, _signed(_fields(b[..., 32:96], 2, groups=2) | _fields(b[..., :32], 1) << 2, 4))


def _scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of eight groups, 6 bits each. The last four use spare bits of the others."""
    first, second, third = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return _half(b, 0) * scales, _half(b, 2) * minima


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    return _by_group(scales, _fields(b[..., 16:], 4, groups=4)) - minima[..., None]


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(b)
    x = _fields(b[..., 48:], 4, groups=4) | _fields(b[..., 16:48], 1) << 4
    return _by_group(scales, x) - minima[..., None]


def _q6_k(b: Tensor) -> Tensor:
    x = _fields(b[..., :128], 4, groups=2) | _fields(b[..., 128:192], 2, groups=2) << 4
    return _by_group(_half(b, 208) * b[..., 192:208].view(torch.int8), _signed(x, 32))


_EXPAND: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
