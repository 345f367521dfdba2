"""Linear layers that compute in 8-bit floats (e4m3), on the cards that can."""

from collections.abc import Iterable

import torch
from torch import nn

from flux.errors import InputError
from flux.modules.layers import Modulation
from flux.modules.linear import Fp8Linear, PackedLinear

FIRST_CARD = (8, 9)  # CUDA compute capability: Ada, Hopper and later


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where products of 8-bit floats are not to be had."""
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= FIRST_CARD and dtype == torch.bfloat16
    else:
        able = device.type == "cpu"
    if not able:
        raise InputError(
            f'Got quantize "fp8" with {str(dtype).split(".")[1]} on {device}, expected bfloat16 on a '
            'CUDA card of capability 8.9 or later, or a CPU: give quantize "8bit"'
        )


def to_fp8(
    modules: Iterable[nn.Module],
    device: torch.device | str | None = None,
    home: torch.device | str | None = None,
) -> None:
    """Replaces the linear layers inside the modules that are plain or packed in e4m3, one after the other,
    but for those of modulations, whose few rows would gain nothing.

    Args:
        device, home: as for `flux.runtime.quantize.quantize_linears`.
    """
    for module in modules:
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                packed = isinstance(child, PackedLinear) and child.kind == "F8_E4M3"
                if (type(child) is nn.Linear or packed) and not isinstance(part, Modulation):
                    setattr(part, name, Fp8Linear(child, device).to(home))
