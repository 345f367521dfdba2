"""Linear layers that compute in 8-bit floats (e4m3), on the cards that can."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.modules.layers import Modulation
from flux.modules.linear import PackedLinear

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
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


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in e4m3, each over a scale of its own that brings its largest number to the largest there is.

    Returns:
        "rows columns" in e4m3, and the scales, "rows 1", in float32.
    """
    scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


class Fp8Linear(nn.Module):
    """A linear layer with weights and activations in e4m3, a scale for each row of either; sums are wider.

    Made of a file's e4m3 numbers, whatever their scales, it keeps them as they are.
    """

    def __init__(self, linear: nn.Linear | PackedLinear, device: torch.device | str | None = None):
        super().__init__()
        if isinstance(linear, PackedLinear):
            packed = linear.packed.detach().to(device).view(E4M3)
            own = torch.ones(()) if linear.scale is None else linear.scale.detach().float()
            scale = own.to(packed.device).view(-1, 1)
            self.dtype = linear.dtype
        else:
            packed, scale = rounded(linear.weight.detach().to(device))
            self.dtype = linear.weight.dtype
        self.out_features, self.in_features = packed.shape
        self.register_buffer("packed", packed)
        # One for each row, or one for all, "1 1", as the file has it.
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(packed.device))

    @property
    def weight(self) -> Tensor:
        """The matrix, "out_features in_features"."""
        return (self.packed.float() * self.scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, 0, None)

    def project(self, x: Tensor, start: int, stop: int | None) -> Tensor:
        """Only the output channels start..stop."""
        rows = slice(start, stop)
        own, scale = rounded(x.flatten(0, -2))
        made = torch._scaled_mm(
            own,
            self.packed[rows].T,
            scale_a=scale,
            scale_b=self.scale.expand(self.out_features, 1)[rows].T.contiguous(),
            bias=None if self.bias is None else self.bias[rows],
            out_dtype=x.dtype,
        )
        return made.view(*x.shape[:-1], -1)


def to_fp8(
    modules: Iterable[nn.Module],
    device: torch.device | str | None = None,
    home: torch.device | str | None = None,
) -> None:
    """Replaces the linear layers inside the modules that are plain or packed in e4m3, one after the other,
    but for those of modulations, whose few rows would gain nothing.

    Args:
        device, home: as for `flux.quantize.quantize_linears`.
    """
    for module in modules:
        for part in list(module.modules()):
            for name, child in list(part.named_children()):
                packed = isinstance(child, PackedLinear) and child.kind == "F8_E4M3"
                if (type(child) is nn.Linear or packed) and not isinstance(part, Modulation):
                    setattr(part, name, Fp8Linear(child, device).to(home))
