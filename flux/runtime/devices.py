"""Device and dtype by name."""

import os
import sys

import torch

from flux.errors import InputError
from flux.specs import ModelSpec


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto": the first of a CUDA GPU, an Apple GPU and the CPU that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # What passes through a card comes in many sizes; segments that can grow leave fewer gaps, so that plans
    # hold under tight caps. Torch reads this when a card is first used; a user's own choice stays.
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
    """The dtype of that name; "auto": bfloat16, but float32 for the package's small model on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" and spec.folder else torch.bfloat16
    return getattr(torch, name)
