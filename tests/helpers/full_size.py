"""FLUX.1-dev at full size, without any file."""

from functools import cache
from pathlib import Path

import torch
from torch import nn

from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.runtime.estimate import MemoryEstimator
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.settings.edits import EditSettings
from flux.specs import configs
from flux.weights.headers import StoredTensor
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.scales import ScaledTensor
from flux.weights.sources import TensorSource


def sources_of(module: nn.Module) -> dict[str, TensorSource]:
    """The sources of a file that stores the module's tensors in bfloat16."""
    return {
        name: TensorSource((ScaledTensor(StoredTensor(Path("x"), "BF16", tuple(x.shape), 0, 2 * x.numel())),))
        for name, x in module.named_parameters()
    }


@cache
def sources(model: str) -> dict[Part, dict[str, TensorSource]]:
    """The sources of a large model, T5-XXL and CLIP-L."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    spec = configs[model]
    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return {
        "transformer": sources_of(on_meta(Flux, spec.params)),
        "vae": sources_of(on_meta(AutoEncoder, spec.ae_params)),
        "text_encoder": sources_of(on_meta(CLIPTextModel, clip)),
        "text_encoder_2": sources_of(on_meta(T5EncoderModel, t5)),
    }


def estimator(model: str = "flux-dev", **fields) -> MemoryEstimator:
    """Estimate a run with a large model.

    With the field "edits" it is a run of demo 4, with "prompts" one of demo 0.
    """
    kinds = {"edits": EditSettings, "prompts": GenerateSettings}
    kind = next((kind for field, kind in kinds.items() if field in fields), ModelSettings)
    settings, dtype = resolve(kind(model=model, **fields)), torch.bfloat16
    return MemoryEstimator(settings, configs[model], sources(model), dtype, dtype, on_gpu=True)
