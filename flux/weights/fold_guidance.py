"""The distilled guidance made a constant, for files that have an input for it where their model has none."""

import torch
import torch.nn.functional as F
from torch import nn

from flux.model import Flux
from flux.modules.layers import MLPEmbedder, timestep_embedding
from flux.modules.linear import AnyLinear, LowRankLinear
from flux.specs import ModelSpec


def fold_guidance(model: Flux, spec: ModelSpec) -> None:
    """Drop the guidance input of a transformer, as if it always got the spec's guidance.

    What the guidance's embedder then returns is a constant, which is added to the time embedder's last bias.
    """
    embedder, last = model.guidance_in, model.time_in.out_layer
    if not isinstance(embedder, MLPEmbedder):
        raise TypeError("Expected a model with a guidance input")
    owner = last.base if isinstance(last, LowRankLinear) else last
    bias = _bias_of(owner)
    scale = torch.tensor([spec.guidance], device=bias.device)
    hidden = embedder.silu(_in_float32(embedder.in_layer, timestep_embedding(scale, 256)))
    added = _in_float32(embedder.out_layer, hidden)[0]
    owner.bias = nn.Parameter((bias.float() + added).to(bias.dtype), requires_grad=False)
    model.guidance_in, model.params = nn.Identity(), spec.params


def _in_float32(linear: AnyLinear, x: torch.Tensor) -> torch.Tensor:
    """Map with a layer's weights in float32, whatever it computes in and however it is stored."""
    return F.linear(x, linear.weight.float(), _bias_of(linear).float())


def _bias_of(linear: nn.Module) -> torch.Tensor:
    bias = linear.base.bias if isinstance(linear, LowRankLinear) else linear.bias
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"Expected a bias, got {type(bias).__name__}")
    return bias
