"""Tensors as the bytes of a safetensors file, which are the same in every process."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from flux.weights.headers import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The format's name of each dtype."""
ALIGNMENT = 8  # bytes


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file.

    safetensors' own function writes the texts of the metadata in another order in each process.

    Args:
        tensors: The tensors by name, on any device.
        metadata: Texts by name.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted((metadata or {}).items()))} if metadata else {}
    # Wide numbers first, so that each tensor is aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    chunks, begin = [], 0
    for name in names:
        x = tensors[name].detach().cpu().contiguous()
        end = begin + x.nbytes
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        chunks.append(x.view(-1).view(torch.uint8).numpy().tobytes())
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join((len(text).to_bytes(8, "little"), text, *chunks))
