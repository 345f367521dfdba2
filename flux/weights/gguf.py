"""The header of a GGUF file: the names, types, shapes and offsets of its tensors.

ggml's own `gguf.GGUFReader` is not used: it memory-maps the file and trusts the lengths in it.
"""

import struct
from typing import BinaryIO, NamedTuple

from flux.modules.gguf_blocks import BLOCKS

MAX_HEADER_BYTES = 100_000_000  # real headers, tokenizers included, have a few megabytes
MAX_DIMS = 4
# Kinds of values in a header, by GGUF's numbers for them: the bytes of a number, and the other two kinds.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY, U32 = 8, 9, 4

# Kinds of tensors: numbers in a block and bytes of a block by name; names by GGUF's numbers for them.
SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), **BLOCKS}
IDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip

Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's kind, its shape, where its bytes begin, and how many there are."""


class GGUFHeader(NamedTuple):
    """A parsed header.

    Attributes:
        size: Its length in bytes.
        architecture: What the file says that its model is, such as "flux"; empty if it says nothing.
        tensors: The file's tensors by name.
    """

    size: int
    architecture: str
    tensors: dict[str, Entry]


class _Reader:
    """Reads numbers and strings up to a limit, so that no length in the file can lead beyond it."""

    def __init__(self, file: BinaryIO, limit: int):
        self.file, self.left = file, limit

    def take(self, count: int) -> bytes:
        self._spend(count)
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("it ends within its header")
        return data

    def skip(self, count: int) -> None:
        self._spend(count)
        self.file.seek(count, 1)

    def _spend(self, count: int) -> None:
        if count > self.left:
            raise ValueError("its header is broken or cut short")
        self.left -= count

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def skip_value(self, kind: int, nested: bool = False) -> None:
        if kind in VALUE_BYTES:
            self.skip(VALUE_BYTES[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and not nested:
            self._skip_array(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"its header has a value of unknown kind {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        if kind in VALUE_BYTES:
            self.skip(count * VALUE_BYTES[kind])
        else:
            for _ in range(count):
                self.skip_value(kind, nested=True)


def parse_gguf_header(file: BinaryIO, size: int) -> GGUFHeader:
    """Parse the header of a GGUF file. Nothing is allocated by lengths that the file only claims.

    Args:
        file: The file, open at its beginning.
        size: Its size in bytes.

    Raises:
        ValueError: The file is broken, cut short, or of a version or kind that is not supported.
    """
    reader = _Reader(file, min(size, MAX_HEADER_BYTES))
    reader.skip(4)
    version, num_tensors, num_keys = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, expected 2 or 3")
    architecture, alignment = "", 32
    for _ in range(num_keys):
        key, kind = reader.string(), reader.number("I")
        if key == "general.alignment" and kind == U32:
            alignment = reader.number("I")
        elif key == "general.architecture" and kind == STRING:
            architecture = reader.string()
        else:
            reader.skip_value(kind)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {alignment}, expected a power of 2")
    raw = []
    for _ in range(num_tensors):
        name, num_dims = reader.string(), reader.number("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"{name[:60]!r} has {num_dims} dimensions")
        shape = tuple(reader.number("Q") for _ in range(num_dims))[::-1]
        raw.append((name, shape, reader.number("I"), reader.number("Q")))
    header_bytes = min(size, MAX_HEADER_BYTES) - reader.left
    tensors = _located(raw, _aligned(header_bytes, alignment), alignment, size)
    return GGUFHeader(header_bytes, architecture, tensors)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _located(
    raw: list[tuple[str, tuple[int, ...], int, int]], begin: int, alignment: int, size: int
) -> dict[str, Entry]:
    """Entries with kinds by name and offsets in the file. The tensors must fill it without gap or overlap."""
    entries: dict[str, Entry] = {}
    end = begin
    for name, shape, kind_id, offset in sorted(raw, key=lambda entry: entry[3]):
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
        start = _aligned(end, alignment)
        if begin + offset != start or name in entries:
            raise ValueError(f"its header is broken at {name[:60]!r}")
        entries[name], end = (kind, shape, start, count), start + count
    if not end <= size <= _aligned(end, alignment):
        raise ValueError(f"it has {size} bytes, expected {end}: the download did not finish, fetch it again")
    return entries
