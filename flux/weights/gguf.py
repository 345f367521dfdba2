"""The header of a GGUF file: its tensors' names, types, shapes and places."""

import struct
from typing import BinaryIO

from flux.modules.gguf_blocks import BLOCKS

MAX_HEAD = 100_000_000  # bytes; real heads, tokenizers included, have a few megabytes
MAX_DIMS = 4
VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, U32 = 8, 9, 4

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
