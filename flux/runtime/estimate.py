"""Estimate how much device memory a run needs, before any weight is loaded.

Weights are counted from their shapes. Activations are measured by running the models on torch's meta device,
which allocates nothing: the transformer at full width, but with one block of each kind.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from flux.conditions.kontext import PREFERED_KONTEXT_RESOLUTIONS, kontext_size
from flux.inputs import Condition, Inputs
from flux.intervention import Intervention
from flux.modules.autoencoder import AutoEncoder
from flux.runtime.activations import live_bytes
from flux.runtime.graphs import MOST_TOKENS
from flux.runtime.quantize import BITS
from flux.runtime.tiling import TILE
from flux.runtime.weight_sizes import ModuleSize, WeightFormat, model_on_meta
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.sources import TensorSource

CUBLAS_WORKSPACE = 32 * 2**20  # bytes that cuBLAS allocates for itself
T5_HEAD = 64  # channels of an attention head of T5-XXL
T5_WIDENING = 2.5  # width of T5-XXL's MLP, divided by the width of the model
REDUX_TOKENS = 729  # of an image, by SigLIP
# Bytes of the models that encode conditions, on the device beside the autoencoder: about 335 million numbers
# of Depth-Anything in float32; 428 of SigLIP and 65 of the Redux adapter in 16 bits.
DEPTH_BYTES, REDUX_BYTES = 4 * 335_000_000, 2 * 493_000_000


def steering_tokens(settings: ModelSettings, spec: ModelSpec) -> tuple[int, int]:
    """Return the tokens that images add to a run: context tokens, and text tokens.

    A model that was trained with such images is assumed to get one at least.
    """
    images = settings if isinstance(settings, ConditionSettings) else ConditionSettings()
    contexts = max(len(images.context), spec.condition == "kontext")
    variations = max(len(images.redux), spec.condition == "redux")
    sizes = (kontext_size(*size, spec.size) for size in PREFERED_KONTEXT_RESOLUTIONS)
    return contexts * max(width // 16 * (height // 16) for width, height in sizes), variations * REDUX_TOKENS


def reuses_context(settings: ModelSettings) -> bool:
    """Return whether steps use the context's keys and values of an earlier one, which are then kept."""
    return isinstance(settings, ConditionSettings) and bool(settings.context) and settings.context_every > 1


class MemoryEstimator:
    """Estimates the bytes that a run with these settings needs, wherever its models are placed.

    Args:
        settings: The run.
        spec: Its model.
        sources: The source of each tensor, for "transformer", "vae", "text_encoder" and "text_encoder_2".
        dtype: Type of the transformer and the autoencoder.
        text_dtype: Type of the text encoders.
        on_gpu: Whether CUDA libraries allocate workspaces, and passes may be recorded as CUDA graphs.
        ranks: What LoRA files change, by network and module, see `OpenModel.ranks_beside`.

    Attributes:
        transformer: Size of the transformer's weights.
        t5: Size of T5's weights on the device. Zero if T5 stays on the CPU.
        clip: Bytes of CLIP's weights.
        autoencoder: Bytes of the autoencoder's weights.
        loaded: Bytes of each network's weights as they are loaded, before any is quantised.
        text: Bytes of activations while prompts are encoded.
        streams: Bytes of the streams that enter each layer in the first step of the reference.
        workspace: Bytes that CUDA libraries allocate.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: ModelSpec,
        sources: Mapping[Part, Mapping[str, TensorSource]],
        dtype: torch.dtype,
        text_dtype: torch.dtype,
        on_gpu: bool,
        ranks: Mapping[Part, Mapping[str, int | None]] = MappingProxyType({}),
    ):
        self.settings, self.spec, self.dtype = settings, spec, dtype
        self.sources = sources
        self.workload = settings.workload()
        self.width, self.height = (side or spec.size for side in (settings.width, settings.height))
        self.image_tokens = self.height // 16 * (self.width // 16)
        self.context_tokens, redux_tokens = steering_tokens(settings, spec)
        self.text_tokens = spec.text_length + redux_tokens
        self.passes = 2 if (settings.true_cfg or spec.true_cfg) > 1 else 1
        self.on_gpu, self.workspace = on_gpu, CUBLAS_WORKSPACE if on_gpu else 0

        t5_bits = 8 if settings.t5 == "8bit" else 16
        self.format = WeightFormat(dtype, BITS[settings.quantize], settings.quantize == "fp8")
        formats: dict[Part, WeightFormat] = {
            "transformer": self.format,
            "vae": WeightFormat(dtype),
            "text_encoder": WeightFormat(text_dtype),
            "text_encoder_2": WeightFormat(text_dtype, t5_bits),
        }
        given = {part: (sources[part], ranks.get(part, {})) for part in formats}
        sizes = {part: formats[part].size_of(*given[part]) for part in formats}
        self.loaded = {part: formats[part].loaded(*given[part]) for part in formats}
        self.transformer, self.autoencoder = sizes["transformer"], sizes["vae"].total
        self.clip = sizes["text_encoder"].total
        self.t5 = ModuleSize((), 0) if settings.t5 == "cpu" else sizes["text_encoder_2"]
        self.text = self._text(text_dtype.itemsize)
        tokens = self.image_tokens + self.context_tokens + self.text_tokens
        self.streams = self.passes * spec.num_layers * tokens * spec.params.hidden_size * dtype.itemsize

    @cached_property
    def denoise(self) -> int:
        """Bytes of activations while images are denoised, kept kv included."""
        return self._one_pass + self._kept()

    @cached_property
    def recorded(self) -> int:
        """Bytes that recorded passes hold during the whole run, if no weights are offloaded.

        They have memory of their own, for what they read, compute and return, see `flux.runtime.graphs`.
        """
        inputs = self._inputs()
        few = len(inputs.img) * sum(inputs.counts) <= MOST_TOKENS
        # At any size, a sparse step has few tokens, and reads keys and values of all layers.
        may_record = few or self.workload.keeps_all_layers
        if not (self.on_gpu and self.settings.compile and may_record):
            return 0
        return self._one_pass + (2 if few else 1) * self._kept()

    @cached_property
    def _one_pass(self) -> int:
        """Bytes of activations of a pass."""
        one_block_each = replace(self.spec.params, depth=1, depth_single_blocks=1)
        model = model_on_meta(one_block_each, self.sources["transformer"], self.format)
        inputs = self._inputs()
        keeping = Intervention(keep_context=reuses_context(self.settings))
        known = [*model.parameters(), *model.buffers(), *inputs.tensors.values()]
        return live_bytes(lambda: model.observe(inputs, keeping), known)

    @cached_property
    def decode(self) -> dict[bool, int]:
        """Bytes of activations while images are decoded or encoded, by whether this is done in tiles."""
        autoencoder = on_meta(AutoEncoder, self.spec.ae_params).to(self.dtype)
        return {tiled: self._decode(autoencoder, tiled) for tiled in (False, True)}

    def _text(self, itemsize: int) -> int:
        """Bytes of T5's attention scores (as they are, with their bias, and as float32) and of its MLP."""
        prompts, tokens = self.workload.batch + self.passes - 1, self.spec.text_length
        width = self.spec.params.context_in_dim
        scores = width // T5_HEAD * tokens**2
        return prompts * (scores * (3 * itemsize + 4) + round(3 * T5_WIDENING * width) * tokens * itemsize)

    def _inputs(self) -> Inputs:
        """The inputs of a pass, on the meta device."""
        params, batch = self.spec.params, self.workload.batch

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        condition = Condition()
        if self.context_tokens:
            condition = Condition(
                context=empty(batch, self.context_tokens, params.in_channels),
                context_ids=empty(batch, self.context_tokens, 3, dtype=torch.float32),
            )
        return Inputs(
            img=empty(batch, self.image_tokens, params.in_channels),
            img_ids=empty(batch, self.image_tokens, 3, dtype=torch.float32),
            txt=empty(batch, self.text_tokens, params.context_in_dim),
            txt_ids=empty(batch, self.text_tokens, 3, dtype=torch.float32),
            timesteps=empty(batch),
            y=empty(batch, params.vec_in_dim),
            guidance=empty(batch),
            condition=condition,
        )

    def _kept(self) -> int:
        """Bytes of what is kept from step to step: keys, values and queries, and the steps' modulations."""
        spec, params, work, batch = self.spec, self.spec.params, self.workload, self.workload.batch
        vectors = 0  # of the model's width
        if reuses_context(self.settings):
            rows = work.interleaved or batch
            vectors += self.passes * rows * spec.num_layers * 2 * self.context_tokens
        kept_layers = len(spec.vital_layers or ()) if work.kept_layers is None else work.kept_layers
        kept_parts = kept_layers if work.keeps_queries else 0
        kept_parts += 2 * (spec.num_layers if work.keeps_all_layers else kept_layers)
        vectors += self.passes * kept_parts * self.image_tokens
        if work.finds_masks:
            # Queries and keys of all tokens, of the edits and of their sources.
            tokens = 2 * batch * (self.image_tokens + self.text_tokens)
            vectors += len(params.junction_layers) * 2 * tokens
        # Modulations of the whole schedule. In the worst case they differ from row to row.
        modulations = 12 * params.depth + 3 * params.depth_single_blocks + 2
        vectors += (self.settings.num_steps or spec.num_steps) * batch * modulations
        return vectors * params.hidden_size * self.dtype.itemsize

    def _decode(self, autoencoder: AutoEncoder, tiled: bool) -> int:
        """Bytes of decoding or encoding one image while the finished images of the batch wait as float32."""
        params, condition = autoencoder.params, self.spec.condition

        def live(convert: Callable[[Tensor], Tensor], channels: int, scale: int, *sides: int) -> int:
            """Bytes of converting one latent or image, or a tile of it, for an image of these sides."""
            latent = [min(side // 8, TILE if tiled else side) for side in sides]
            x = torch.empty(1, channels, *(scale * side for side in latent), dtype=self.dtype, device="meta")
            return live_bytes(lambda: convert(x), [*autoencoder.parameters(), x])

        numbers = [live(autoencoder.decode, params.z_channels, 1, self.height, self.width)]
        if self.workload.encodes or condition in ("control", "fill"):
            encoder = DEPTH_BYTES if self.spec.control == "depth" else 0
            numbers.append(encoder + live(autoencoder.encode, params.in_channels, 8, self.height, self.width))
        if self.context_tokens:
            numbers.append(live(autoencoder.encode, params.in_channels, 8, self.spec.size, self.spec.size))
        if self.text_tokens > self.spec.text_length:
            numbers.append(REDUX_BYTES)
        finished = 4 * params.out_ch * self.height * self.width
        return max(numbers) + (self.workload.batch + 2 * tiled) * finished
