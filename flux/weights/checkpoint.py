"""Checkpoints: one weight file, or a folder with one file or its shards.

Only headers are read until a tensor is asked for.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from flux.errors import InputError
from flux.weights.headers import (
    NO_PICKLE,
    FileHeader,
    StoredTensor,
    parse_json,
    read_header,
    read_json,
    short_name,
    unreadable,
)
from flux.weights.scales import ScaledTensor, pair_with_scales

INDEX = ".safetensors.index.json"
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.safetensors|\.gguf)")
MAX_SHARDS = 1000
SAMPLE_BYTES = 4096  # hashed of each tensor


@dataclass(frozen=True)
class Checkpoint:
    """One or more files that belong together, opened: their headers are parsed, no tensor is read.

    Attributes:
        path: The file or folder, as given.
        headers: The header of each file.
        tensors: All tensors by name, matrices of 8-bit floats joined with their scales.
    """

    path: Path
    headers: tuple[FileHeader, ...]
    tensors: dict[str, ScaledTensor]

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of all files."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    def fingerprint(self) -> str:
        """Identify the checkpoint without reading all of it.

        Hashes the size and header of each file, 4 KiB from the middle of each tensor, and the file's end.
        """
        digest = hashlib.sha256()
        for header in self.headers:
            digest.update(str(header.size).encode())
            spans = [header.span]
            for tensor in header.tensors.values():
                middle = tensor.offset + tensor.size // 2
                begin = max(tensor.offset, middle - SAMPLE_BYTES // 2)
                spans.append((begin, begin + min(SAMPLE_BYTES, tensor.size)))
            end = max(0, header.size - SAMPLE_BYTES)
            spans.append((end, end + SAMPLE_BYTES))
            with header.path.open("rb") as file:
                for begin, stop in spans:
                    file.seek(begin)
                    digest.update(file.read(stop - begin))
        return digest.hexdigest()[:32]


def open_checkpoint(path: Path, subfolder: str = "") -> Checkpoint:
    """Open a weight file, the shards that an index lists, or a folder that holds one of these.

    Args:
        path: The file, the index (".safetensors.index.json"), or the folder.
        subfolder: Where to look inside a folder, if that exists: "transformer" of a whole model.

    Raises:
        InputError: No complete safetensors or GGUF file is there. The message says what is there instead.
    """
    # os.path: unlike Path it also answers for names that cannot exist, and in folders that cannot be read.
    if os.path.isdir(path):
        headers = _headers_in_folder(path / subfolder if os.path.isdir(path / subfolder) else path)
    elif path.name.endswith(INDEX):
        headers = _headers_of_shards(path)
    else:
        headers = tuple(map(read_header, _all_shards(path)))
    stored: dict[str, StoredTensor] = {}
    for header in headers:
        repeated = stored.keys() & header.tensors.keys()
        if repeated:
            raise InputError(f"Got {path}, where {short_name(min(repeated))} stands in two of its files")
        stored |= header.tensors
    declared = [
        parse_json(header.metadata["_quantization_metadata"], header.path)
        for header in headers
        if "_quantization_metadata" in header.metadata
    ]
    return Checkpoint(path, headers, pair_with_scales(path, stored, declared))


def _headers_in_folder(folder: Path) -> tuple[FileHeader, ...]:
    """The headers of the shards that an index in the folder lists, or of its one weight file."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    indices = [path for path in paths if path.name.endswith(INDEX)]
    files = [path for path in paths if path.suffix in (".safetensors", ".sft", ".gguf")]
    usual = [path for path in files if path.name in USUAL_NAMES]
    # Beside half-precision variants ("....fp16.safetensors.index.json") the plain form is meant.
    indices = [path for path in indices if path.name.count(".") == 3] or indices
    if indices and not usual:
        return _headers_of_shards(indices[0])
    files = usual or files
    if files and set(files) <= set(shards := _all_shards(files[0])):
        return tuple(map(read_header, shards))
    if files:
        names = ", ".join(path.name for path in files[:3]) + (" ..." if len(files) > 3 else "")
        raise InputError(f"Got {folder}, a folder of several files ({names}): give the path of one of them")
    pickles = [path for path in paths if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise InputError(f"Got {folder}, where {pickles[0].name} is {NO_PICKLE}")
    raise InputError(
        f"Got {folder}, a folder without .safetensors or .gguf files: give the path of the file itself"
    )


def _all_shards(path: Path) -> list[Path]:
    """The file, and the other shards that belong to it by its name, "...-00001-of-00003.safetensors".

    Raises:
        InputError: Shards are missing.
    """
    found = SHARD.fullmatch(path.name)
    if not found or not os.path.isfile(path):
        return [path]
    count = min(int(found[2]), MAX_SHARDS)
    shards = [path.with_name(f"{found[1]}-{i:05}-of-{found[2]}{found[3]}") for i in range(1, count + 1)]
    missing = [shard.name for shard in shards if not os.path.isfile(shard)]
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"Got {path}, one of {count} shards, where {names} is missing: fetch all of them")
    return shards


def read_weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, as an index says.

    Raises:
        InputError: The index is broken.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"Got {index}, which has no weight_map: fetch it again")
    return weight_map


def _headers_of_shards(index: Path) -> tuple[FileHeader, ...]:
    weight_map = read_weight_map(index)
    headers = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(f"Got {index}, which names {file[:60]!r}: expected files beside it")
        if not os.path.isfile(index.parent / file):
            raise InputError(
                f"Got {index.parent}, where {short_name(file)} is missing: the download did not finish"
            )
        headers.append(read_header(index.parent / file))
    for header in headers:
        listed = {name for name, file in weight_map.items() if file == header.path.name}
        if listed != header.tensors.keys():
            differing = short_name(min(listed ^ header.tensors.keys()))
            raise InputError(
                f"Got {header.path}, which does not fit its index: {differing} is only in one of both"
            )
    return tuple(headers)
