"""Norms and modulation: the small parts that blocks are made of."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32 whatever the dtype of `x`."""

    eps = 1e-6

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise "... dim"."""
        return F.rms_norm(x, self.scale.shape, self.scale, eps=self.eps)


class QKNorm(nn.Module):
    """RMS normalisation of queries and keys, per head."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries and keys, "B H N D" each, in the dtype of the values."""
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


@dataclass
class ModulationOut:
    """Shift, scale and gate of one residual branch, "B 1 C" each.

    The branch f makes x + gate * f((1 + scale) * norm(x) + shift) of x.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


def split_modulation(mod: Tensor, count: int) -> list[ModulationOut]:
    """Cut the modulations of `count` residual branches, "B count*3C", into one for each branch."""
    parts = mod.unsqueeze(1).chunk(3 * count, dim=-1)
    return [ModulationOut(*parts[i : i + 3]) for i in range(0, 3 * count, 3)]


def layer_norm(dim: int) -> nn.LayerNorm:
    """The layer norm before a modulation, which has no scale and shift of its own."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
