"""GGUF: the head of such a file, and its packed numbers as plain ones, by torch alone.

A packed matrix is rows of blocks. A block holds 32 or 256 numbers of few bits and, in half precision, what
scales and shifts them. Formulae: the reference decoder of ggml's `gguf` package, to the last bit.
"""

import struct
from collections.abc import Callable
from typing import BinaryIO

import torch
from torch import Tensor

MAX_HEAD = 100_000_000  # bytes; real heads, tokenizers included, have a few megabytes
MAX_DIMS = 4
VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, U32 = 8, 9, 4

# kind -> numbers in a block, bytes of a block
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
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), **BLOCKS}
IDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip


# ---- the head


class _Reader:
    """Reads numbers and strings up to a limit, which no length in the file can go beyond."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit

    def take(self, count: int) -> bytes:
        self.skip(count, seek=False)
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("it ends within its head")
        return data

    def skip(self, count: int, seek: bool = True) -> None:
        if count > self.left:
            raise ValueError("its head is broken or cut short")
        self.left -= count
        if seek:
            self.file.seek(count, 1)

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def skip_value(self, kind: int, nested: bool = False) -> None:
        if kind in VALUE_SIZES:
            self.skip(VALUE_SIZES[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and not nested:
            kind, count = self.number("I"), self.number("Q")
            if kind in VALUE_SIZES:
                self.skip(count * VALUE_SIZES[kind])
            else:
                for _ in range(count):
                    self.skip_value(kind, nested=True)
        else:
            raise ValueError(f"its head has a value of unknown kind {kind}")


def read_head(file: BinaryIO, size: int) -> tuple[int, dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """What a GGUF file holds.

    Args:
        file: open at its beginning; size: its bytes.

    Returns:
        The length of its head, and of each tensor by name: kind, shape, and where its bytes begin and how
        many they are.

    Raises:
        ValueError: it is broken, cut short, or of a version or kind that is not known. Nothing is allocated
            by lengths that the file only claims.
    """
    reader = _Reader(file, min(size, MAX_HEAD))
    reader.skip(4)
    version, num_tensors, num_keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, expected 2 or 3")
    alignment = 32
    for _ in range(num_keys):
        key, kind = reader.string(), reader.number("I")
        if key == "general.alignment" and kind == U32:
            alignment = reader.number("I")
        else:
            reader.skip_value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}, expected a power of 2")
    entries = []
    for _ in range(num_tensors):
        name, num_dims = reader.string(), reader.number("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"{name[:60]!r} has {num_dims} dimensions")
        shape = tuple(reader.number("Q") for _ in range(num_dims))[::-1]
        entries.append((name, shape, reader.number("I"), reader.number("Q")))
    head = min(size, MAX_HEAD) - reader.left
    return head, _placed(entries, -(-head // alignment) * alignment, alignment, size)


def _placed(
    entries: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int, size: int
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The entries with kinds by name and places in the file. They must fill it without gap or overlap."""
    tensors, end = {}, begin
    for name, shape, kind_id, offset in sorted(entries, key=lambda entry: entry[3]):
        if kind_id not in IDS:
            raise ValueError(
                f"{name[:60]!r} is of GGUF kind {kind_id}, which is not supported: take a file of one of "
                f"{', '.join(SIZES)}"
            )
        kind = IDS[kind_id]
        per_block, block_bytes = SIZES[kind]
        columns = shape[-1] if shape else 1
        if columns % per_block:
            raise ValueError(f"{name[:60]!r} has rows of {columns}, expected a multiple of {per_block}")
        count = columns // per_block * block_bytes
        for length in shape[:-1]:
            count *= length
        place = -(-end // alignment) * alignment
        if begin + offset != place or name in tensors:
            raise ValueError(f"its head is broken at {name[:60]!r}")
        tensors[name], end = (kind, shape, place, count), place + count
    if not end <= size <= -(-end // alignment) * alignment:
        raise ValueError(f"it has {size} bytes, expected {end}: the download did not finish, fetch it again")
    return tensors


# ---- the numbers


def expand(packed: Tensor, kind: str) -> Tensor:
    """Packed rows, "rows bytes" of uint8 -> their numbers in float32, "rows columns"."""
    per_block, block_bytes = BLOCKS[kind]
    blocks = packed.unflatten(-1, (-1, block_bytes))
    return _EXPAND[kind](blocks).reshape(*packed.shape[:-1], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at that byte of each block, in float32: "... 1"."""
    return blocks[..., at : at + 2].view(torch.float16).float()


def _fields(x: Tensor, bits: int, groups: int = 1) -> Tensor:
    """Bytes cut into fields of 1, 2 or 4 bits: of each group all lowest fields first, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)[:, None]
    return ((x.unflatten(-1, (groups, 1, -1)) >> shifts) & (2**bits - 1)).flatten(-3)


def _signed(x: Tensor, zero: int) -> Tensor:
    """Small unsigned bytes with `zero` taken off."""
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
    """Each group's scale times its numbers: "... groups" and "... block" -> "... groups width"."""
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
    """Eight of each, in 6 bits, their upper halves spread over what the first four leave free; scaled."""
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
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
