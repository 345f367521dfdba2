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
        return F.rms_norm(x, self.scale.shape, self.scale, eps=self.eps)


class QKNorm(nn.Module):
    """RMS normalisation of queries and keys, per head."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm, self.key_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


@dataclass
class ModulationOut:
    """Shift, scale and gate of one residual branch, "B 1 C" each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def applied_to(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, 1 + self.scale)


def layer_norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
