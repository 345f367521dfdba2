"""Quantises the linear layers of a model's blocks, to 8 or 4 bits or to 8-bit floats."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from flux.errors import InputError
from flux.modules.layers import Modulation
from flux.modules.linear import Fp8Linear, PackedLinear, QuantizedLinear, group_size

BITS = {"none": 16, "8bit": 8, "4bit": 4, "fp8": 8}
FP8_CAPABILITY = (8, 9)  # CUDA compute capability of Ada and Hopper

Device = torch.device | str | None


def quantized_bytes(rows: int, columns: int, bits: int, itemsize: int) -> int:
    """Return the bytes of a quantised matrix whose scales are numbers of `itemsize` bytes."""
    weights = rows * columns
    return weights * bits // 8 + itemsize * (rows if bits == 8 else 2 * weights // group_size(columns))


def quantize_linears(
    modules: Iterable[nn.Module], bits: int, device: Device = None, home: Device = None
) -> None:
    """Replace every plain linear layer inside the modules by one with weights in 8 or 4 bits.

    Weights are expanded while a layer computes. Layers are replaced one by one, to save memory.

    Args:
        modules: The modules.
        bits: 8 or 4.
        device: Where each layer is quantised. If None, where it is.
        home: Where it is then kept. If None, where it was quantised.
    """
    for parent, name, child in _children(modules):
        if type(child) is nn.Linear:
            setattr(parent, name, QuantizedLinear(child, bits, device).to(home))


def to_fp8(modules: Iterable[nn.Module], device: Device = None, home: Device = None) -> None:
    """Replace linear layers inside the modules, plain or packed in e4m3, by ones that compute in e4m3.

    Modulations stay as they are, because a product of few rows would gain nothing.

    Args:
        modules: The modules.
        device: Where each layer is converted. If None, where it is.
        home: Where it is then kept. If None, where it was converted.
    """
    for parent, name, child in _children(modules):
        if isinstance(parent, Modulation):
            continue
        if type(child) is nn.Linear or (isinstance(child, PackedLinear) and child.kind == "F8_E4M3"):
            setattr(parent, name, Fp8Linear(child, device).to(home))


def _children(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every parent, name and child inside the modules. The child may be replaced meanwhile."""
    for module in modules:
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                yield parent, name, child


def check_fp8_support(device: torch.device, dtype: torch.dtype) -> None:
    """Check that a device can multiply 8-bit floats.

    Args:
        device: Where the model computes.
        dtype: Type of its activations.

    Raises:
        InputError: If it cannot.
    """
    if device.type == "cuda":
        supported = torch.cuda.get_device_capability(device) >= FP8_CAPABILITY and dtype == torch.bfloat16
    else:
        supported = device.type == "cpu"
    if not supported:
        raise InputError(
            f'Got quantize "fp8" with {str(dtype).split(".")[1]} on {device}, expected bfloat16 on a '
            'CUDA GPU of capability 8.9 or later, or a CPU: give quantize "8bit"'
        )
