"""A trained LoRA as a file that this package, diffusers and ComfyUI load."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux.files import write_bytes
from flux.lora.adapters import LoraLinear
from flux.weights.save import safetensors_bytes


def save_lora(
    path: Path, adapters: Mapping[str, LoraLinear], dtype: torch.dtype, about: Mapping[str, object]
) -> None:
    """Write the factors under diffusers' names, each pair with its alpha.

    Where diffusers has queries, keys and values in matrices of their own, these share the first factor.

    Args:
        path: The file.
        adapters: The trained layers by module.
        dtype: The dtype of the factors in the file.
        about: Facts for the file's metadata. Texts stay as they are, everything else becomes JSON.

    Raises:
        InputError: As `flux.files.write_bytes`.
    """
    tensors: dict[str, Tensor] = {}
    for adapter in adapters.values():
        down, up = adapter.down.detach().to(dtype), adapter.up.detach().to(dtype)
        for their, rows in adapter.target.in_diffusers():
            tensors[f"transformer.{their}.lora_A.weight"] = down
            tensors[f"transformer.{their}.lora_B.weight"] = up[rows]
            tensors[f"transformer.{their}.alpha"] = torch.tensor(adapter.target.alpha)
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    write_bytes(path, safetensors_bytes(tensors, {"format": "pt", **metadata}))
