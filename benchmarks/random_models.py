"""All four models of FLUX.1 with random weights in main memory, plain or packed as files pack them."""

import tempfile
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import EDITS, PROMPT, source_of, sources_of, words_of
from benchmarks.random_weights import write_text_encoders
from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.modules import gguf_blocks
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.float8 import EIGHT_BIT_FLOATS
from flux.modules.linear import PackedLinear
from flux.runtime.plan import Plan
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.sources import TensorSource

T5_XXL = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
T5_TOY = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
CLIP_TOY = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# Where a block has its scales in half precision, and the scales that give random bytes a deviation of 1.
SCALES = {"Q8_0": {0: 1 / 74}, "Q4_K": {0: 1 / 260, 2: 7.5 / 260}}


@dataclass(frozen=True)
class Packed:
    """A matrix of random numbers as files pack it.

    Attributes:
        kind: The form of the numbers.
        rows: The packed rows, `rows bytes`.
        scale: The scale of all numbers. If None, the blocks have their own.
    """

    kind: str
    rows: Tensor
    scale: Tensor | None

    @classmethod
    def draw(cls, kind: str, shape: torch.Size, deviation: float, device: torch.device) -> "Packed":
        """Draw a matrix on the device, and keep it in main memory."""
        if kind in EIGHT_BIT_FLOATS:
            rows = (64 * torch.randn(shape, device=device)).to(EIGHT_BIT_FLOATS[kind])
            return cls(kind, rows.view(torch.uint8).cpu(), torch.tensor(deviation / 64))
        numbers, size = gguf_blocks.BLOCKS[kind]
        rows = torch.randint(256, (shape[0], shape[1] // numbers, size), dtype=torch.uint8, device=device)
        for at, scale in SCALES[kind].items():
            half = torch.tensor([scale * deviation], dtype=torch.float16, device=device)
            rows[..., at : at + 2] = half.view(torch.uint8)
        return cls(kind, rows.flatten(1).cpu(), None)


class RandomModels:
    """Random weights of the four models in main memory, to load models from.

    Args:
        spec: The spec of the model.
        device: Where random numbers are drawn.
        dtype: The dtype of the weights.
        t5: The sizes of the T5 encoder.
        clip: The sizes of the CLIP encoder.

    Attributes:
        weights: The weights by part and name.
        sources: The same, described as if a file held them.
        plain: These models with no weights packed.
    """

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, t5: dict, clip: dict):
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.spec, self.dtype, self.device, self.plain = spec, dtype, device, self
        self.kinds: dict[Part, tuple[Any, Any]] = {
            "transformer": (Flux, spec.params),
            "vae": (AutoEncoder, spec.ae_params),
            "text_encoder_2": (T5EncoderModel, T5Config(**t5, feed_forward_proj="gated-gelu")),
            "text_encoder": (CLIPTextModel, CLIPTextConfig(**clip)),
        }
        torch.manual_seed(0)
        self.weights: dict[Part, dict[str, Any]] = {
            part: self._draw(on_meta(*kind)) for part, kind in self.kinds.items()
        }
        self.sources: dict[Part, dict[str, TensorSource]] = {
            part: sources_of(weights) for part, weights in self.weights.items()
        }
        folder = Path(tempfile.mkdtemp())
        write_text_encoders(folder, spec, words_of([PROMPT, *EDITS]))
        self.tokenizers = {"text_encoder": folder / "tokenizer", "text_encoder_2": folder / "tokenizer_2"}

    def _draw(self, model: nn.Module) -> dict[str, Tensor]:
        """Draw weights on the device, tensor by tensor, that keep activations of order one."""
        weights = {}
        for name, x in model.named_parameters():
            if name.endswith(".scale") or ("norm" in name and name.endswith(".weight")):
                weights[name] = torch.ones(x.shape, dtype=self.dtype)
                continue
            deviation = x[0].numel() ** -0.5 if x.ndim > 1 else 0.02
            drawn = torch.randn(x.shape, device=self.device, dtype=self.dtype)
            weights[name] = drawn.mul_(deviation).cpu()
        return weights

    def packed(self, kind: str) -> "RandomModels":
        """Pack the matrices of the transformer's blocks. All other weights are shared."""
        other = copy(self)
        weights, sources = dict(self.weights["transformer"]), dict(self.sources["transformer"])
        for name, x in self.weights["transformer"].items():
            if x.ndim == 2 and "_blocks." in name:
                weights[name] = packed = Packed.draw(kind, x.shape, x.shape[1] ** -0.5, self.device)
                sources[name] = source_of(kind, x.shape, packed.rows.nbytes)
        other.weights = {**self.weights, "transformer": weights}
        other.sources = {**self.sources, "transformer": sources}
        return other

    def packed_matrices(self) -> dict[str, Packed]:
        """Return the transformer's packed matrices by name."""
        return {name: x for name, x in self.weights["transformer"].items() if isinstance(x, Packed)}

    def build(self, part: Part) -> Any:
        """Build a model that shares these weights."""
        model = on_meta(*self.kinds[part])
        plain = {name: x for name, x in self.weights[part].items() if not isinstance(x, Packed)}
        model.load_state_dict(plain, strict=False, assign=True)
        if part == "transformer":
            for name, x in self.packed_matrices().items():
                parent, _, own = name.removesuffix(".weight").rpartition(".")
                module = model.get_submodule(parent)
                bias = getattr(module, own).bias
                setattr(module, own, PackedLinear(x.rows, x.kind, bias, x.scale, self.dtype))
        if part == "text_encoder_2":
            model.encoder.embed_tokens = model.shared
        for name, buffer in list(model.named_buffers()):
            module, _, leaf = name.rpartition(".")
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            model.get_submodule(module).register_buffer(leaf, positions, persistent=False)
        return model.eval().requires_grad_(False)

    def load(self, settings: ModelSettings, plan: Plan) -> LoadedModel:
        """Build all models and place them as planned."""
        lengths: dict[Part, int] = {
            "text_encoder_2": self.spec.text_length,
            "text_encoder": self.spec.clip_length,
        }
        t5, clip = (
            HFEmbedder.from_encoder(self.build(part), length, str(self.tokenizers[part]))
            for part, length in lengths.items()
        )
        model, ae = self.build("transformer"), self.build("vae")
        loaded = LoadedModel(self.spec, model, ae, t5, clip, self.device, self.dtype)
        loaded.place(settings, plan)
        return loaded
