"""Weights in 8 or 4 bits, expanded layer by layer while the net computes: a half or a quarter of the memory.

Plain torch, so that it runs wherever the net does and its weights move and stream as any others do.
"""

from collections.abc import Iterable

import torch
from torch import nn

from flux.errors import InputError
from flux.modules.layers import Modulation
from flux.modules.linear import Fp8Linear, PackedLinear, QuantizedLinear, group_size

BITS = {"none": 16, "8bit": 8, "4bit": 4, "fp8": 8}


def quantized_bytes(rows: int, columns: int, bits: int, itemsize: int) -> int:
    """Returns the bytes of a quantised matrix whose scales are numbers of `itemsize` bytes."""
    weights = rows * columns
    return weights * bits // 8 + itemsize * (rows if bits == 8 else 2 * weights // group_size(columns))


def quantize_linears(
    modules: Iterable[nn.Module],
    bits: int,
    device: torch.device | str | None = None,
    home: torch.device | str | None = None,
) -> None:
    """Replaces every linear layer inside the modules, one after the other, so that memory holds one of them.

    Args:
        device: where each is worked out; None: where it is.
        home: where each is kept then; None: where it was worked out.
    """
    for module in modules:
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                if type(child) is nn.Linear:
                    setattr(part, name, QuantizedLinear(child, bits, device).to(home))


FIRST_FP8_CARD = (8, 9)  # CUDA compute capability: Ada, Hopper and later


def check_device(device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError where products of 8-bit floats are not to be had."""
    if device.type == "cuda":
        able = torch.cuda.get_device_capability(device) >= FIRST_FP8_CARD and dtype == torch.bfloat16
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
