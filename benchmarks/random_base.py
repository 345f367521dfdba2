"""A transformer of random weights in main memory, which trainings load as they load a file's."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common import source_of
from benchmarks.random_weights import random_transformer
from flux.lora.base import Base
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.runtime.quantize import BITS, quantize_linears, to_fp8
from flux.settings.resolved import ResolvedTrain
from flux.specs import ModelSpec
from flux.weights.load import on_meta
from flux.weights.sources import TensorSource


class RandomBase:
    """A transformer of random weights in main memory, plain and packed.

    Args:
        spec: The spec of the model.
        dtype: The dtype of its weights.
        device: Where they are drawn, and where models compute.
        t5: The size of T5, which a forecast asks for.
        clip: The size of CLIP.

    Attributes:
        opened: What a forecast asks of a model's files.
        models: The transformer by the setting "quantize".
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, t5: dict, clip: dict):
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.spec, self.dtype, self.device = spec, dtype, device
        sources = {
            "transformer": _sources_of(on_meta(Flux, spec.params), dtype),
            "vae": _sources_of(on_meta(AutoEncoder, spec.ae_params), dtype),
            "text_encoder": _sources_of(on_meta(CLIPTextModel, CLIPTextConfig(**clip)), dtype),
            "text_encoder_2": _sources_of(on_meta(T5EncoderModel, T5Config(**t5)), dtype),
        }
        transformer = SimpleNamespace(sources=sources["transformer"])
        self.opened: Any = SimpleNamespace(
            transformer=transformer, sources=lambda: sources, ranks_beside=dict
        )
        torch.manual_seed(0)
        plain = on_meta(Flux, spec.params)
        plain.load_state_dict(random_transformer(spec.params, device), assign=True)
        self.models = {"none": self._in_main_memory(plain.to(dtype).requires_grad_(False))}

    def model(self, quantize: str) -> Flux:
        """Return the transformer of a form. It is packed when it is first asked for."""
        if quantize not in self.models:
            packed = shared(self.models["none"])
            blocks = [packed.double_blocks, packed.single_blocks]
            if quantize == "fp8":
                to_fp8(blocks, self.device, self.device)
            else:
                quantize_linears(blocks, BITS[quantize], self.device, self.device)
            self.models[quantize] = self._in_main_memory(packed)
        return self.models[quantize]

    def _in_main_memory(self, model: Flux) -> Flux:
        """Move a model, in place. Each case copies it from there, which is fast from pinned memory."""
        for x in (*model.parameters(), *model.buffers()):
            home = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.device.type == "cuda")
            x.data = home.copy_(x)
        return model

    def load(self, settings: ResolvedTrain, streamed: int) -> Base:
        """Load the transformer as a training does."""
        model = self.model(settings.quantize)
        opened: Any = SimpleNamespace(load_transformer=lambda home, *_: shared(model).to(home))
        return Base.load(settings, opened, self.device, self.dtype, streamed)


def _sources_of(module: nn.Module, dtype: torch.dtype) -> dict[str, TensorSource]:
    """Describe a model's tensors as if a file held them in that dtype."""
    kind = "BF16" if dtype == torch.bfloat16 else "F32"
    return {
        name: source_of(kind, x.shape, x.numel() * dtype.itemsize) for name, x in module.named_parameters()
    }


def shared(model: Flux) -> Flux:
    """Copy a model whose tensors stay where they are, and are used by both."""
    memo: dict[int, Any] = {id(x): nn.Parameter(x.detach(), False) for x in model.parameters()}
    memo |= {id(x): x.detach() for x in model.buffers()}
    return deepcopy(model, memo)
