"""Headers of weight files: which tensors a safetensors or GGUF file holds, and where.

The format is told by content, not by name. All reading is plain: some file systems refuse to map files into
memory (OSError 19). No pickle is ever loaded.
"""

import difflib
import json
import math
import operator
import os
import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux.errors import InputError, warn
from flux.weights.gguf import parse_gguf_header
from flux.weights.zeros import ZERO_PAGE, zero_stretch

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
READ_BYTES = 64 * 2**20  # read at once
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NO_PICKLE = "a pickle, never loaded since it may run code: convert it to .safetensors, or take such a file"
OTHER_FORMATS = {
    b"PK\x03\x04": NO_PICKLE,
    b"\x80": NO_PICKLE,
    b"<": "a web page: the download went wrong, fetch it again",
}
ZERO_TAIL_BYTES = 2**20
UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload", ".download")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file stores it.

    Attributes:
        path: The file.
        kind: The number format by the name that the file format uses: "BF16", "F8_E4M3", "Q4_K", ...
        shape: The tensor's shape; for packed kinds the shape of the expanded tensor.
        offset: Where its bytes begin in the file.
        size: How many bytes it has.
        name: Its name in the file, for messages.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int
    name: str = ""

    def read(self, device: torch.device | str = "cpu", is_filled: bool = False) -> Tensor:
        """Read the tensor in its stored dtype; a packed kind as uint8, "rows bytes".

        Args:
            device: Where it is put.
            is_filled: Whether a stretch of zeros within it means damage. A LoRA may have such stretches.

        Raises:
            InputError: The file cannot be read or ends too early, or has a stretch of zeros all the same.
        """
        # A copy to a GPU is several times as fast from pinned memory.
        pinned = torch.device(device).type == "cuda"
        raw = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        view, done = raw.numpy().data, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while done < self.size:
                    count = file.readinto(view[done : done + READ_BYTES])
                    if not count:
                        raise InputError(f"Got {self.path}, which ends too early: fetch it again")
                    done += count
        except OSError as error:
            raise unreadable(self.path, error) from error
        if is_filled and (length := zero_stretch(raw.numpy())):
            self._tell_of_zeros(length)
        if self.kind in DTYPES:
            return raw.view(DTYPES[self.kind]).reshape(self.shape).to(device)
        return raw.reshape(*self.shape[:-1], -1).to(device)

    def _tell_of_zeros(self, length: int) -> None:
        """Warn if the whole tensor is zeros, which may be meant. Else raise an InputError."""
        where = f"Got {self.path}, where {short_name(self.name)}"
        if length > self.size - ZERO_PAGE:
            warn(f"{where} is zeros alone: if that is not meant, the file is damaged, fetch it again")
            return
        raise InputError(
            f"{where} has {length / 2**20:.0f} MiB of zeros: the download did not finish, or the file is "
            f"damaged, fetch it again{_unfinished_beside(self.path)}"
        )


@dataclass(frozen=True)
class FileHeader:
    """The parsed header of one file.

    Attributes:
        path: The file.
        size: Bytes of the whole file.
        span: Where the header's bytes begin and end.
        tensors: The file's tensors by name.
        metadata: Texts in the header by name; of GGUF only the one that says what the model is.
    """

    path: Path
    size: int
    span: tuple[int, int]
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> FileHeader:
    """Read the header of one file.

    Raises:
        InputError: The file is not a complete safetensors or GGUF file. The message says what it is instead.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would keep us waiting
            raise InputError(f"Got {path}, which is no file: give the path of a .safetensors or .gguf file")
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise unreadable(path, error) from error
    size = status.st_size
    refuse_lfs_pointer(path, start)
    _refuse_zero_tail(path, size)
    if start.startswith(b"GGUF"):
        return _gguf_header(path, size)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if start[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES:
        return _safetensors_header(path, size, length)
    raise InputError(f"Got {path}, which is {_other_format(start, size)}")


def _missing(path: Path) -> InputError:
    """The error for a file that does not exist, with what may have been meant."""
    if re.match(r"https?:", str(path)):
        address = str(path).replace(":/", "://", 1)  # as it was before it became a path
        return InputError(f"Got {address}, an address: download the file, and give its path")
    hint = _unfinished_beside(path)
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists():
        hint = f" (if it is a repository of the hub: hf download {path} --local-dir {path.name})"
    elif path.parent.is_dir() and os.access(path.parent, os.R_OK):
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
        hint = hint or (f" (did you mean {near[0]}?)" if near else "")
    return InputError(
        f"Got {path}, which does not exist: give the path of a .safetensors or .gguf file{hint}"
    )


def _refuse_zero_tail(path: Path, size: int) -> None:
    """Refuse a file that was given its full size but never filled to its end."""
    if size <= ZERO_TAIL_BYTES:
        return
    with path.open("rb") as file:
        file.seek(size - ZERO_TAIL_BYTES)
        tail = file.read(ZERO_TAIL_BYTES)
    if not tail.strip(b"\0"):
        raise InputError(
            f"Got {path}, whose last {ZERO_TAIL_BYTES >> 20} MiB are zeros: the download did not finish, "
            f"fetch it again{_unfinished_beside(path)}"
        )


def _unfinished_beside(path: Path) -> str:
    """A note of a file beside it that a download was written to."""
    for ending in UNFINISHED:
        if os.path.exists(f"{path}{ending}"):
            return f" ({path.name}{ending} beside it is unfinished)"
    return ""


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise an `InputError` if a file that begins with these bytes is only a Git-LFS pointer."""
    if start.startswith(LFS_POINTER):
        true_size = re.search(rb"\nsize (\d+)", start)
        target = f" to {int(true_size[1])} bytes" if true_size else ""
        raise InputError(
            f"Got {path}, which is a Git-LFS pointer{target} and not the file itself: run `git lfs pull`"
        )


def _other_format(start: bytes, size: int) -> str:
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic):
            return name
    if size and not any(start):
        return "full of zeros: the download was cut short, fetch it again"
    return f"no safetensors or GGUF file ({size} bytes): it may be cut short, or of another format"


def _gguf_header(path: Path, size: int) -> FileHeader:
    try:
        with path.open("rb") as file:
            header = parse_gguf_header(file, size)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"Got {path}, a GGUF file, but {error}{_unfinished_beside(path)}") from error
    tensors = {name: StoredTensor(path, *entry, name) for name, entry in header.tensors.items()}
    said = {"general.architecture": header.architecture} if header.architecture else {}
    return FileHeader(path, size, (0, header.size), tensors, said)


def _safetensors_header(path: Path, size: int, length: int) -> FileHeader:
    broken = f"Got {path}, whose header is broken: it may be cut short, fetch it again"
    if 8 + length > size:
        raise InputError(f"{broken} ({size} bytes, expected more than {8 + length})")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique_keys)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
        tensors = {name: _safetensors_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(broken) from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != end:
            raise InputError(broken)
        end += tensor.size
    if size != end:
        raise InputError(
            f"Got {path} with {size} bytes, expected {end}: the download did not finish, fetch it "
            f"again{_unfinished_beside(path)}"
        )
    return FileHeader(path, size, (8, 8 + length), tensors, metadata)


def _safetensors_entry(path: Path, name: str, entry: dict[str, Any], data_begin: int) -> StoredTensor:
    shape = tuple(map(operator.index, entry["shape"]))
    begin, end = map(operator.index, entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        kind = str(entry["dtype"])[:20]
        mlx = "; it is quantised for Apple's MLX" if kind == "U32" else ""
        raise InputError(
            f"Got {path}, whose header has numbers of kind {kind!r}, not known here{mlx}: take a "
            "GGUF or fp8 file"
        )
    size = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size:
        raise ValueError("shape and size differ")
    return StoredTensor(path, entry["dtype"], shape, data_begin + begin, end - begin, name)


# ---- shared by the readers of other files


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the operating system refuses to read."""
    return InputError(f"Got {path}, which cannot be read: {error.strerror}")


def read_bytes(path: Path) -> bytes:
    """Read a small file.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: It cannot be read, or as `parse_json`.
    """
    return parse_json(read_bytes(path), path)


def short_name(name: str) -> str:
    """A tensor's or file's name from a file, made printable and short enough for a message."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 80 else f"{shown[:60]} ... {shown[-15:]}"


def parse_json(text: str | bytes, source: Path) -> dict[str, Any]:
    """Parse a JSON text that holds an object.

    Raises:
        InputError: The text is broken, holds something else, or repeats a key.
    """
    refuse_lfs_pointer(source, text[:512] if isinstance(text, bytes) else text[:512].encode())
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
        if not isinstance(data, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise InputError(f"Got {source}, whose JSON is broken: fetch it again") from error
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is repeated")
    return dict(pairs)
