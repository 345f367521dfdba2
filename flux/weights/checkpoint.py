"""What lies at a path, told by its content: safetensors or GGUF, one file or a folder of shards.

Only heads are read until a tensor is asked for, and all reading is plain: some file systems refuse to map
files into memory (OSError 19). No pickle is ever loaded.
"""

import hashlib
import json
import math
import operator
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules import gguf_blocks
from flux.weights import gguf

MAX_HEADER = 100_000_000  # bytes, the format's own bound
PIECE = 64 * 2**20  # bytes read at once
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BIT = ("F8_E4M3", "F8_E5M2")
NO_PICKLE = "a pickle, never loaded since it may run code: convert it to .safetensors, or take such a file"
OTHER_KINDS = {
    b"PK\x03\x04": NO_PICKLE,
    b"\x80": NO_PICKLE,
    b"<": "a web page: the download went wrong, fetch it again",
}
LFS = b"version https://git-lfs"
# Beside a matrix X.weight: its scale; and what only 8-bit products and other programs need.
SCALES = (".scale_weight", ".weight_scale")
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
FOREIGN = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit (nf4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit (fp4)",
    ".wscales": "Nunchaku (SVDQuant) 4-bit",
    "._data": "quanto",
}


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: kind by the name its container uses, and its place in bytes."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """Its numbers as they are stored; those of a packed kind as bytes, "rows bytes".

        Raises:
            InputError: the file cannot be read, or ends too early.
        """
        # From pinned memory a copy to a GPU is several times as fast.
        pinned = torch.device(device).type == "cuda"
        raw = torch.empty(self.size, dtype=torch.uint8, pin_memory=pinned)
        view, done = memoryview(raw.numpy()), 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                while done < self.size:
                    count = file.readinto(view[done : done + PIECE])
                    if not count:
                        raise InputError(f"Got {self.path}, which ends too early: fetch it again")
                    done += count
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if self.kind in DTYPES:
            return raw.view(DTYPES[self.kind]).reshape(self.shape).to(device)
        return raw.reshape(*self.shape[:-1], -1).to(device)


@dataclass(frozen=True)
class Head:
    """What the head of one file says.

    Attributes:
        span: where the head's own bytes begin and end.
    """

    path: Path
    size: int
    span: tuple[int, int]
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Weight:
    """A tensor of a net as a file holds it, with the scale of 8-bit floats where there is one."""

    stored: Stored
    scale: Stored | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def kind(self) -> str:
        return self.stored.kind

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """Its numbers: what is packed or scaled in float32, the rest as it is stored."""
        if torch.device(device).type == "mps" and self.kind in EIGHT_BIT:  # which has no such numbers
            return self.read("cpu").float().to(device)
        raw = self.stored.read(device)
        if self.kind in gguf_blocks.BLOCKS:
            return gguf_blocks.expand(raw, self.kind)
        if self.scale is not None:
            return raw.float() * self.read_scale(device)
        return raw

    def read_scale(self, device: torch.device | str = "cpu") -> Tensor:
        """The scale in float32: a number, or one for each row, "rows 1"."""
        scale = self.scale.read(device).float()
        return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)


@dataclass(frozen=True)
class Checkpoint:
    """One or more files that belong together. Raw tensors in `heads`, a net's weights in `weights`."""

    path: Path
    heads: tuple[Head, ...]
    weights: dict[str, Weight]

    @property
    def metadata(self) -> dict[str, str]:
        return {key: value for head in self.heads for key, value in head.metadata.items()}


def open_checkpoint(path: Path, part: str = "") -> Checkpoint:
    """What lies at `path`: a file, or a folder that holds one or the shards of one.

    Args:
        part: the folder within that to look in if it is there, as in "transformer" of a whole model.

    Raises:
        InputError: no whole safetensors or GGUF file; the message says what it is instead.
    """
    if not path.is_dir():
        heads = (read_head(path),)
    else:
        folder = path / part if (path / part).is_dir() else path
        heads = _heads_of_folder(folder)
    stored: dict[str, Stored] = {}
    for head in heads:
        repeated = stored.keys() & head.tensors.keys()
        if repeated:
            raise InputError(f"Got {path}, where {short(min(repeated))} stands in two of its files")
        stored |= head.tensors
    formats = [json_of(head.metadata["_quantization_metadata"], head.path)
               for head in heads if "_quantization_metadata" in head.metadata]  # fmt: skip
    return Checkpoint(path, heads, _with_scales(path, stored, formats))


def fingerprint(path: Path, part: str = "transformer") -> str:
    """Tells one checkpoint from another without reading all of it: a hash of the size of each file, of its
    header, and of 4 KiB from the middle of each tensor and from the end of the file.
    """
    digest = hashlib.sha256()
    for head in open_checkpoint(path, part).heads:
        digest.update(str(head.size).encode())
        with head.path.open("rb") as file:

            def add(begin: int, count: int, file=file) -> None:
                file.seek(begin)
                digest.update(file.read(count))

            add(head.span[0], head.span[1] - head.span[0])
            for entry in head.tensors.values():
                end = entry.offset + entry.size
                begin = max(entry.offset, (entry.offset + end) // 2 - 2048)
                add(begin, min(4096, entry.size))
            add(max(0, head.size - 4096), 4096)
    return digest.hexdigest()[:32]


# ---- one file


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"Got {path}, which cannot be read: {error.strerror}")


def read_head(path: Path) -> Head:
    """The head of one file. Raises InputError if it is no whole file of weights, saying what it is."""
    try:
        size = os.stat(path).st_size
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise InputError(
            f"Got {path}, which does not exist: give the path of a .safetensors or .gguf file"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if start.startswith(LFS):
        size_there = re.search(rb"\nsize (\d+)", start)
        of = f" to {int(size_there[1])} bytes" if size_there else ""
        raise InputError(
            f"Got {path}, which is a Git-LFS pointer{of} and not the file itself: run `git lfs pull`"
        )
    if start.startswith(b"GGUF"):
        return _gguf_head(path, size)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if start[8:9] == b"{" and 2 <= length <= MAX_HEADER:
        return _safetensors_head(path, size, length)
    kind = next((kind for magic, kind in OTHER_KINDS.items() if start.startswith(magic)), None)
    if kind is None:
        kind = f"no safetensors or GGUF file ({size} bytes): it may be cut short, or of another format"
        if size and not any(start):
            kind = "full of zeros: the download was cut short, fetch it again"
    raise InputError(f"Got {path}, which is {kind}")


def _gguf_head(path: Path, size: int) -> Head:
    try:
        with path.open("rb") as file:
            end, entries = gguf.read_head(file, size)
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # UnicodeDecodeError too
        raise InputError(f"Got {path}, a GGUF file, but {error}") from error
    return Head(path, size, (0, end), {name: Stored(path, *entry) for name, entry in entries.items()})


def _safetensors_head(path: Path, size: int, length: int) -> Head:
    broken = f"Got {path}, whose header is broken: it may be cut short, fetch it again"
    if 8 + length > size:
        raise InputError(f"{broken} ({size} bytes, expected more than {8 + length})")
    with path.open("rb") as file:
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
        tensors = {name: _entry(path, entry, 8 + length) for name, entry in header.items()}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(broken) from error
    end = 8 + length
    for entry in sorted(tensors.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            raise InputError(broken)
        end += entry.size
    if size != end:
        raise InputError(
            f"Got {path} with {size} bytes, expected {end}: the download did not finish, fetch it again"
        )
    return Head(path, size, (8, 8 + length), tensors, metadata)


def _no_repeats(pairs: list[tuple]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def _entry(path: Path, entry: dict, data_begin: int) -> Stored:
    shape = tuple(map(operator.index, entry["shape"]))
    begin, end = map(operator.index, entry["data_offsets"])
    if entry["dtype"] not in DTYPES:
        kind = str(entry["dtype"])[:20]
        raise InputError(f"Got {path}, whose header has numbers of kind {kind!r}, not known here")
    size = math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size:
        raise ValueError("shape and size differ")
    return Stored(path, entry["dtype"], shape, data_begin + begin, end - begin)


# ---- a folder


def _heads_of_folder(folder: Path) -> tuple[Head, ...]:
    """The shards that an index in the folder names, else its one file of weights."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".sft", ".gguf"))
    usual = [path for path in files if path.name in USUAL_NAMES]
    # With half-precision variants beside the plain form, the plain one is meant.
    indices = [path for path in indices if path.name.count(".") == 3] or indices
    if indices and not usual:
        return _shards(indices[0])
    files = usual or files
    if len(files) == 1:
        return (read_head(files[0]),)
    if files:
        names = ", ".join(path.name for path in files[:3]) + (" ..." if len(files) > 3 else "")
        raise InputError(f"Got {folder}, a folder of several files ({names}): give the path of one of them")
    pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise InputError(f"Got {folder}, where {pickles[0].name} is {NO_PICKLE}")
    raise InputError(
        f"Got {folder}, which is a folder and holds no .safetensors file: give the path of the file itself"
    )


def _shards(index: Path) -> tuple[Head, ...]:
    try:
        text = index.read_bytes()
    except OSError as error:
        raise _unreadable(index, error) from error
    weight_map = json_of(text, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"Got {index}, which has no weight_map: fetch it again")
    heads = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"Got {index}, which names {file[:60]!r}: expected files beside it")
        if not os.path.isfile(index.parent / file):  # says no to what cannot be a name, too
            raise InputError(
                f"Got {index.parent}, where {short(file)} is missing: the download did not finish"
            )
        heads.append(read_head(index.parent / file))
    for head in heads:
        own = {name for name, file in weight_map.items() if file == head.path.name}
        if own != head.tensors.keys():
            differing = min(own ^ head.tensors.keys())
            raise InputError(
                f"Got {head.path}, which does not fit its index: {short(differing)} is only in one of both"
            )
    return tuple(heads)


def short(name: str) -> str:
    """A name from a file, fit for a line."""
    shown = name if name.isprintable() else repr(name)[1:-1]
    return shown if len(shown) <= 80 else f"{shown[:60]} ... {shown[-15:]}"


def json_of(text: str | bytes, source: Path) -> dict:
    """The object in a JSON text. Raises InputError if it is none."""
    try:
        data = json.loads(text, object_pairs_hook=_no_repeats)
        if not isinstance(data, dict):
            raise ValueError
    except (ValueError, RecursionError) as error:
        raise InputError(f"Got {source}, whose JSON is broken: fetch it again") from error
    return data


# ---- scales


def _with_scales(path: Path, stored: dict[str, Stored], formats: Iterable[dict]) -> dict[str, Weight]:
    """Each matrix of 8-bit floats with its scale; what is of use to other programs only is left out.

    A scale that no matrix takes stays, as a name no net has: loaded without it, a matrix makes noise.
    """
    for name in stored:
        kind = next((what for ending, what in FOREIGN.items() if name.endswith(ending)), None)
        if kind:
            raise InputError(f"Got {path}, which is {kind}: not supported, take a GGUF or fp8 file")
    for layers in (entry.get("layers") for entry in formats):
        for name, layer in layers.items() if isinstance(layers, dict) else ():
            _check_format(path, name, layer)
    weights, taken = {}, set()
    for name, entry in stored.items():
        scale = None
        if name.endswith(".weight") and entry.kind in EIGHT_BIT:
            stem = name.removesuffix(".weight")
            scale = next((stem + ending for ending in SCALES if stem + ending in stored), None)
            if scale and stored[scale].kind in FLOATS and _scales(stored[scale].shape, entry.shape):
                taken.add(scale)
                taken |= {stem + ending for ending in UNUSED}
                description = stored.get(stem + ".comfy_quant")
                if description:
                    _check_format(path, stem, json_of(_text_of(description), path))
            else:
                scale = None
        weights[name] = Weight(entry, stored[scale] if scale else None)
    marker = {name for name in stored if name == MARKER or name.endswith("." + MARKER)}
    inputs = {name for name in stored if name.endswith(".scale_input")}
    return {name: weight for name, weight in weights.items() if name not in taken | marker | inputs}


def _scales(scale: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    return math.prod(scale) == 1 or scale in (matrix[:1], (*matrix[:1], 1))


def _text_of(entry: Stored) -> bytes:
    return entry.read().numpy().tobytes() if entry.kind == "U8" and entry.size < 10_000 else b""


def _check_format(path: Path, name: str, layer) -> None:
    kind = layer.get("format") if isinstance(layer, dict) else None
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        what = f"{short(name)} is quantised as {str(kind)[:40]!r}"
        raise InputError(f"Got {path}, where {what}: not supported, take a GGUF or fp8 file")
