"""Linear layers with a low-rank change (arXiv 2106.09685) whose strength can be set at any time.

The names are those of upstream's package. Models that this package loads have their changes merged in, or
beside packed weights as `flux.modules.linear.LowRankLinear`.
"""

import torch
from torch import Tensor, nn


class LinearLora(nn.Linear):
    """A linear layer to whose output `scale` times lora_B(lora_A(x)) is added.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        bias: Whether the layer itself has a bias.
        rank: Channels between both matrices of the change; at most those of the input or the output.
        dtype: Type of all weights.
        device: Where they are.
        lora_bias: Whether the change has a bias.
        scale: Strength of the change.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        lora_bias: bool = True,
        scale: float = 1.0,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        rank = min(rank, in_features, out_features)
        self.lora_A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, out_features, bias=lora_bias, device=device, dtype=dtype)
        self.scale = scale

    def set_scale(self, scale: float) -> None:
        """Set the strength of the change."""
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        """Map "... in_features" to "... out_features"."""
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


def replace_linear_with_lora(module: nn.Module, max_rank: int, scale: float = 1.0) -> None:
    """Replace every linear layer inside a module by a `LinearLora` with the same weights.

    Args:
        module: The module, changed in place.
        max_rank: Largest rank of a change.
        scale: Strength of the changes.
    """
    for name, child in list(module.named_children()):
        if type(child) is not nn.Linear:
            replace_linear_with_lora(child, max_rank, scale)
            continue
        weight, bias = child.weight, child.bias
        sizes = child.in_features, child.out_features
        changed = LinearLora(*sizes, bias is not None, max_rank, weight.dtype, weight.device, scale=scale)
        changed.weight, changed.bias = weight, bias
        setattr(module, name, changed)
