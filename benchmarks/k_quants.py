"""Packs matrices into GGUF's blocks of 256 by plain rounding.

The `gguf` package only reads these kinds. Programs that write them also search for the best scales, so their
files are a little better than these. The layouts are those of `flux.modules.gguf_blocks`.
"""

import numpy as np

LEVELS = {"Q2_K": 3, "Q4_K": 15, "Q5_K": 31}
GROUP = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}
KINDS = tuple(GROUP)


def quantize(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Pack a float matrix, whose columns are a multiple of 256, to rows of bytes, `rows bytes`."""
    blocks = matrix.astype(np.float32).reshape(-1, 256)
    groups = blocks.reshape(len(blocks), -1, GROUP[kind])
    packed = _with_minima(groups, kind) if kind in LEVELS else _around_zero(groups, kind)
    return packed.reshape(len(matrix), -1)


def _half(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round numbers to half precision. Return them with their bytes."""
    half = x.astype(np.float16)
    return half.astype(np.float32), half.view(np.uint8)


def _steps(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round a block's scales to multiples of one number. Return the number, its bytes and the multiples."""
    unit, raw = _half(np.abs(x).max(axis=1, keepdims=True) / levels)
    return unit, raw, np.rint(np.divide(x, unit, out=np.zeros_like(x), where=unit > 0))


def _levels(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0))


def _fields(x: np.ndarray, bits: int, groups: int = 1) -> np.ndarray:
    """Pack small numbers, `blocks n`, into bytes. The first of each group take the lowest bits."""
    x = x.astype(np.uint8).reshape(len(x), groups, 8 // bits, -1)
    return np.bitwise_or.reduce([x[:, :, i] << (i * bits) for i in range(8 // bits)]).reshape(len(x), -1)


def _with_minima(groups: np.ndarray, kind: str) -> np.ndarray:
    levels, most = LEVELS[kind], 15 if kind == "Q2_K" else 63
    low = np.minimum(groups.min(axis=2), 0)
    d, d_raw, scales = _steps((groups.max(axis=2) - low) / levels, most)
    e, e_raw, minima = _steps(-low, most)
    shifted = groups + (e * minima)[..., None]
    x = _levels(shifted, (d * scales)[..., None]).clip(0, levels).reshape(len(groups), -1)
    scales, minima = scales.astype(np.uint8), minima.astype(np.uint8)
    if kind == "Q2_K":
        return np.concatenate([scales | minima << 4, _fields(x, 2, 2), d_raw, e_raw], axis=1)
    spread = [
        scales[:, :4] | scales[:, 4:] >> 4 << 6,
        minima[:, :4] | minima[:, 4:] >> 4 << 6,
        scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4,
    ]
    x = x.astype(np.uint8)
    high = [_fields(x >> 4, 1)] if kind == "Q5_K" else []
    return np.concatenate([d_raw, e_raw, *spread, *high, _fields(x & 15, 4, 4)], axis=1)


def _around_zero(groups: np.ndarray, kind: str) -> np.ndarray:
    half, most = (4, 31) if kind == "Q3_K" else (32, 127)
    d, d_raw, scales = _steps(np.abs(groups).max(axis=2) / (half - 0.5), most)
    x = _levels(groups, (d * scales)[..., None]).clip(-half, half - 1) + half
    x = x.reshape(len(groups), -1).astype(np.uint8)
    if kind == "Q6_K":
        low, high = _fields(x & 15, 4, 2), _fields(x >> 4, 2, 2)
        return np.concatenate([low, high, scales.astype(np.int8).view(np.uint8), d_raw], axis=1)
    scales = (scales + 32).astype(np.uint8)
    spread = [_fields(scales & 15, 4), _fields(scales >> 4, 2)]
    return np.concatenate([_fields(x >> 2, 1), _fields(x & 3, 2, 2), *spread, d_raw], axis=1)
