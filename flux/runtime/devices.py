"""Devices and dtypes by name."""

import os
import sys

import torch

from flux.errors import InputError
from flux.specs import ModelSpec


def pick_device(name: str) -> torch.device:
    """Return the device of that name. "auto" prefers a CUDA GPU, then an Apple GPU, then the CPU.

    Raises:
        InputError: If the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # Tensors have many sizes. Segments that can grow leave fewer gaps, so that a tight plan fits.
    # torch reads this variable when it first uses a GPU. A value that the user has set is kept.
    if name.startswith("cuda") and sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Got device {name!r}, which is not here: give cpu, cuda, cuda:1, mps or auto"
        ) from error
    return device


def pick_dtype(name: str, device: torch.device, spec: ModelSpec) -> torch.dtype:
    """Return the dtype of that name. "auto" is float32 for the bundled model on a CPU, otherwise bfloat16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" and spec.folder else torch.bfloat16
    return getattr(torch, name)
