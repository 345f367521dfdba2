"""Estimate how much device memory a run needs, before any weight is loaded.

Weights are counted from their shapes. Activations are measured by running the models on torch's meta device,
which allocates nothing: the transformer at full width, but with one block of each kind.
"""

import math
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flux.conditions.kontext import PREFERED_KONTEXT_RESOLUTIONS, kontext_size
from flux.inputs import Condition, Inputs
from flux.intervention import Intervention
from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoder
from flux.modules.float8 import EIGHT_BIT_FLOATS
from flux.modules.linear import PackedLinear
from flux.runtime.offload import evenly_spaced
from flux.runtime.quantize import BITS, quantize_linears, quantized_bytes, to_fp8
from flux.runtime.tiling import TILE
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.sources import TensorSource

CUBLAS_WORKSPACE = 32 * 2**20  # bytes that cuBLAS allocates for itself
BLOCK = r"(double_blocks|single_blocks|encoder\.block)\.(\d+)\."
T5_HEAD = 64  # channels of an attention head of T5-XXL
T5_WIDENING = 2.5  # width of T5-XXL's MLP, divided by the width of the model
REDUX_TOKENS = 729  # of an image, by SigLIP
# Bytes of the models that encode conditions, on the device beside the autoencoder: about 335 million numbers
# of Depth-Anything in float32; 428 of SigLIP and 65 of the Redux adapter in 16 bits.
DEPTH_BYTES, REDUX_BYTES = 4 * 335_000_000, 2 * 493_000_000


# ---- activations


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of new tensors while the mode is active.

    Args:
        known: Tensors that exist already. They are not counted.

    Attributes:
        current: Bytes of the new tensors that are alive now.
        peak: The largest value that `current` had.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {x.untyped_storage()._cdata for x in known}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        for x in results:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.seen:
                self._add(x.untyped_storage())
        if (
            func is torch.ops.aten.conv2d.default
        ):  # inference mode dispatches composite operations as they are
            # cuDNN copies its input and its output into the memory layout that it prefers.
            self.peak = max(self.peak, self.current + args[0].nbytes + results[0].nbytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, storage_id: int, nbytes: int) -> None:
        self.seen.discard(storage_id)
        self.current -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Makes attention allocate its result only, as the fused kernels of a GPU do."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def live_bytes(run: Callable[[], object], known: list[Tensor]) -> int:
    """Return the most bytes that tensors made by `run` occupy at the same time.

    Args:
        run: The computation.
        known: Tensors that exist before it. They are not counted.
    """
    with torch.inference_mode(), LiveBytes(known) as live, _FusedAttention():
        run()
    return live.peak


# ---- weights


@dataclass(frozen=True)
class ModuleSize:
    """The bytes of a model's weights.

    Attributes:
        blocks: Bytes of each block, in the order in which they compute.
        rest: Bytes of all other weights.
    """

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.blocks) + self.rest

    def on_device(self, streamed: int) -> int:
        """Bytes on the device while `streamed` blocks are streamed: the other weights and two buffers."""
        if not streamed:
            return self.total
        chosen = [self.blocks[number] for number in evenly_spaced(streamed, len(self.blocks))]
        return self.total - sum(chosen) + 2 * max(chosen)


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored on the device. Matrices that a file packs stay packed, others have `dtype`.

    Attributes:
        dtype: Type of all numbers that are not packed.
        bits: Bits per weight of the matrices inside blocks. With 8, a file's 8-bit floats stay packed too.
        fp8: Whether the 8 bits are floats. Modulations then keep `dtype`.
    """

    dtype: torch.dtype
    bits: int = 16
    fp8: bool = False

    def keeps_packed(self, source: TensorSource) -> bool:
        """Return whether a matrix stays as its file packs it."""
        return source.is_packed and (self.bits == 8 or source.kind not in EIGHT_BIT_FLOATS)

    def nbytes(self, source: TensorSource, quantized: bool, rank: int | None = 0) -> int:
        """Return the bytes of one tensor.

        Args:
            source: Where it comes from.
            quantized: Whether `bits` applies to it.
            rank: Rank of the LoRA branch that it gets if it stays packed. If None, LoRA files change it in a
                way that has to be merged, which expands it.
        """
        if len(source.shape) == 2:
            if self.keeps_packed(source) and rank is not None:
                branch = rank * sum(source.shape) * self.dtype.itemsize
                return sum(part.stored.size for part in source.parts) + branch
            if quantized and self.bits < 16:
                return quantized_bytes(*source.shape, self.bits, self.dtype.itemsize)
        return math.prod(source.shape) * self.dtype.itemsize

    def size_of(
        self, sources: Mapping[str, TensorSource], ranks: Mapping[str, int | None] = MappingProxyType({})
    ) -> ModuleSize:
        """Return the size of a model.

        Args:
            sources: The sources of its tensors, by name.
            ranks: What LoRA files change, by module, see `OpenModel.ranks_beside`.
        """
        blocks: dict[tuple[str, int], int] = {}
        rest = 0
        for name, source in sources.items():
            block = re.match(BLOCK, name)
            rank = ranks.get(name.removesuffix(".weight"), 0)
            if block:
                key = (block[1], int(block[2]))
                quantized = not (self.fp8 and re.search(r"mod(ulation)?\.lin\.", name))
                blocks[key] = blocks.get(key, 0) + self.nbytes(source, quantized, rank)
            else:
                rest += self.nbytes(source, False, rank)
        return ModuleSize(tuple(blocks[key] for key in sorted(blocks)), rest)


def model_on_meta(
    params: FluxParams, sources: Mapping[str, TensorSource], weight_format: WeightFormat
) -> Flux:
    """Build the transformer on the meta device, with weights in that format."""
    with torch.device("meta"):
        model = Flux(params).to(weight_format.dtype)
        for name, module in list(model.named_modules()):
            source = sources.get(f"{name}.weight")
            kind = source.kind if source and weight_format.keeps_packed(source) else None
            if source and kind and isinstance(module, nn.Linear):
                row_bytes = sum(part.stored.size for part in source.parts) // source.shape[0]
                packed = torch.empty(source.shape[0], row_bytes, dtype=torch.uint8)
                scale = torch.empty(()) if kind in EIGHT_BIT_FLOATS else None
                parent, _, attribute = name.rpartition(".")
                linear = PackedLinear(packed, kind, module.bias, scale, weight_format.dtype)
                setattr(model.get_submodule(parent), attribute, linear)
        if weight_format.fp8:
            to_fp8([model.double_blocks, model.single_blocks])
        elif weight_format.bits < 16:
            quantize_linears([model.double_blocks, model.single_blocks], weight_format.bits)
    return model


def one_block_model(
    params: FluxParams, sources: Mapping[str, TensorSource], weight_format: WeightFormat
) -> Flux:
    """Build the transformer as `model_on_meta`, with one block of each kind."""
    return model_on_meta(replace(params, depth=1, depth_single_blocks=1), sources, weight_format)


# ---- a run


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
        on_gpu: Whether CUDA libraries allocate workspaces.
        ranks: What LoRA files change, by network and module, see `OpenModel.ranks_beside`.

    Attributes:
        transformer: Size of the transformer's weights.
        t5: Size of T5's weights on the device. Zero if T5 stays on the CPU.
        clip: Bytes of CLIP's weights.
        autoencoder: Bytes of the autoencoder's weights.
        text: Bytes of activations while prompts are encoded.
        denoise: Bytes of activations while images are denoised, kept kv included.
        decode: Bytes of activations while images are decoded or encoded. The key tells whether this is done
            in tiles.
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
        self.workload = settings.workload()
        self.width, self.height = (side or spec.size for side in (settings.width, settings.height))
        self.image_tokens = self.height // 16 * (self.width // 16)
        self.context_tokens, redux_tokens = steering_tokens(settings, spec)
        self.text_tokens = spec.text_length + redux_tokens
        self.passes = 2 if (settings.true_cfg or spec.true_cfg) > 1 else 1
        self.workspace = CUBLAS_WORKSPACE if on_gpu else 0

        weight_format = WeightFormat(dtype, BITS[settings.quantize], settings.quantize == "fp8")
        text_format = WeightFormat(text_dtype)
        t5_format = WeightFormat(text_dtype, 8) if settings.t5 == "8bit" else text_format
        self.transformer = weight_format.size_of(sources["transformer"], ranks.get("transformer", {}))
        self.autoencoder = WeightFormat(dtype).size_of(sources["vae"]).total
        self.clip = text_format.size_of(sources["text_encoder"], ranks.get("text_encoder", {})).total
        on_cpu, t5_ranks = settings.t5 == "cpu", ranks.get("text_encoder_2", {})
        self.t5 = ModuleSize((), 0) if on_cpu else t5_format.size_of(sources["text_encoder_2"], t5_ranks)

        self.text = self._text(text_dtype.itemsize)
        self.denoise = self._denoise(one_block_model(spec.params, sources["transformer"], weight_format))
        autoencoder = on_meta(AutoEncoder, spec.ae_params).to(dtype)
        self.decode = {tiled: self._decode(autoencoder, tiled) for tiled in (False, True)}
        tokens = self.image_tokens + self.context_tokens + self.text_tokens
        self.streams = self.passes * spec.num_layers * tokens * spec.params.hidden_size * dtype.itemsize

    def _text(self, itemsize: int) -> int:
        """Bytes of T5's attention scores (as they are, with their bias, and as float32) and of its MLP."""
        prompts, tokens = self.workload.batch + self.passes - 1, self.spec.text_length
        width = self.spec.params.context_in_dim
        scores = width // T5_HEAD * tokens**2
        return prompts * (scores * (3 * itemsize + 4) + round(3 * T5_WIDENING * width) * tokens * itemsize)

    def _denoise(self, model: Flux) -> int:
        """Bytes of one forward pass and of all that is kept from step to step."""
        spec, params, batch = self.spec, self.spec.params, self.workload.batch
        channel_bytes = params.hidden_size * self.dtype.itemsize

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        condition = Condition()
        if self.context_tokens:
            ids = empty(batch, self.context_tokens, 3, dtype=torch.float32)
            condition = Condition(
                context=empty(batch, self.context_tokens, params.in_channels), context_ids=ids
            )
        inputs = Inputs(
            img=empty(batch, self.image_tokens, params.in_channels),
            img_ids=empty(batch, self.image_tokens, 3, dtype=torch.float32),
            txt=empty(batch, self.text_tokens, params.context_in_dim),
            txt_ids=empty(batch, self.text_tokens, 3, dtype=torch.float32),
            timesteps=empty(batch),
            y=empty(batch, params.vec_in_dim),
            guidance=empty(batch),
            condition=condition,
        )
        given = [x for x in (*vars(inputs).values(), *vars(condition).values()) if isinstance(x, Tensor)]
        keeping = Intervention(keep_context=reuses_context(self.settings))
        known = [*model.parameters(), *model.buffers(), *given]
        nbytes = live_bytes(lambda: model.observe(inputs, keeping), known)
        if keeping.keep_context:
            rows = self.workload.interleaved or batch
            nbytes += self.passes * rows * spec.num_layers * 2 * self.context_tokens * channel_bytes
        kept_layers = self.workload.kept_layers
        if kept_layers is None:
            kept_layers = len(spec.vital_layers or ())
        kept_parts = kept_layers if self.workload.keeps_queries else 0
        kept_parts += 2 * (spec.num_layers if self.workload.keeps_all_layers else kept_layers)
        nbytes += self.passes * kept_parts * self.image_tokens * channel_bytes
        if self.workload.finds_masks:
            # Queries and keys of all tokens, of the edits and of their sources.
            tokens = 2 * batch * (self.image_tokens + self.text_tokens)
            nbytes += len(params.junction_layers) * 2 * tokens * channel_bytes
        # Modulations of the whole schedule. In the worst case they differ from row to row.
        modulations = 12 * params.depth + 3 * params.depth_single_blocks + 2
        steps = self.settings.num_steps or spec.num_steps
        return nbytes + steps * batch * modulations * channel_bytes

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
