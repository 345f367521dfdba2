"""How much memory and time a training needs, told before anything loads.

Weights are counted from their shapes. Activations are measured by one training step of the whole model on
torch's meta device, which allocates nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flux.errors import InputError
from flux.inputs import Condition
from flux.lora.adapters import Target, add_adapters, prepare_backward
from flux.lora.dataset import Example
from flux.lora.step import context_condition, velocity_loss
from flux.model import Inputs
from flux.runtime.activations import LiveBytes
from flux.runtime.devices import total_memory
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import GIB, Stage, duration, free_memory, operations, operations_per_second
from flux.runtime.quantize import BITS
from flux.runtime.weight_sizes import ModuleSize, WeightFormat, model_on_meta
from flux.settings.train import TrainSettings
from flux.specs import ModelSpec
from flux.weights.open_model import OpenModel

ADAPTER_BYTES = 16  # of each trained number: itself, its gradient and AdamW's two moments, in float32
# The share of the speed of large matrices that a training step reaches. At 1024x1024 on an H100 it is 0.25 to
# 0.43, with smaller images and streamed blocks less (`benchmarks.lora_training`).
EFFICIENCY = {"cuda": 0.36, "cpu": 0.6}
ADVICE = {
    "encode images": "give smaller sizes, or tiled true",
    "encode texts": 'give t5 "8bit" or "cpu"',
    "train": 'give smaller sizes or batches, quantize "8bit" or "4bit", offload "auto", or later layers',
    "sample": 'make the samples smaller, give quantize "8bit" or "4bit", or offload "auto"',
}
"""Advice for each stage that may not fit."""
HOST_SHARE = 0.8  # of this machine's memory that a training on the CPU may fill


class _Attention(torch.autograd.Function):
    """Attention that allocates what a GPU's fused kernels keep: queries, keys, values and the result."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG004
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Norm(torch.autograd.Function):
    """An RMS norm that keeps its input as it is. Elsewhere than on a GPU, torch keeps it in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:  # noqa: ARG004
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


class _Fused(TorchFunctionMode):
    """Replaces attention by `_Attention` and, for a GPU, RMS norms by `_Norm`."""

    def __init__(self, on_gpu: bool):
        super().__init__()
        self.on_gpu = on_gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        if func is F.rms_norm and self.on_gpu:
            return _Norm.apply(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Forecast:
    """The memory and time of a training, and how it runs within them.

    Attributes:
        stages: The memory of each stage on the device.
        streamed: Number of blocks that are streamed.
        checkpointing: Whether activations are computed again in the backward pass.
        parameters: Trained numbers.
        seconds: About how long a training step takes.
    """

    stages: tuple[Stage, ...]
    streamed: int
    checkpointing: bool
    parameters: int
    seconds: float

    @property
    def largest(self) -> Stage:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.needed)

    def line(self, steps: int, free: int | None) -> str:
        """Return the forecast as a line."""
        peak = self.largest
        ways = ["activations are computed twice"] * self.checkpointing
        ways += [f"{self.streamed} blocks are streamed"] * bool(self.streamed)
        of_free = "" if free is None else f" of {free / GIB:.1f}"
        time = duration(steps * self.seconds)
        return (
            f"forecast: {self.parameters:,} trained numbers, at most {peak.peak / GIB:.2f}{of_free} GiB (to "
            f"{peak.name}), about {time} for {steps} steps{': ' if ways else ''}{', '.join(ways)}"
        )


class Forecaster:
    """Forecasts a training, however its blocks are placed.

    Args:
        settings: The training.
        spec: The model.
        opened: Its files.
        targets: The trained matrices.
        largest: The training image with the most pixels.
        device: Where it is trained.
        dtype: The dtype that it computes in.
    """

    def __init__(
        self,
        settings: TrainSettings,
        spec: ModelSpec,
        opened: OpenModel,
        targets: Sequence[Target],
        largest: Example,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.settings, self.spec, self.targets, self.dtype = settings, spec, targets, dtype
        self.largest, self.device = largest, device
        self.is_pair = largest.context is not None
        self.rows = -(-settings.batch_size // settings.parallel)
        self.first = min(target.layer for target in targets)
        self.parameters = sum(target.parameters for target in targets)
        self.sources = opened.transformer.sources
        self.format = WeightFormat(dtype, BITS[settings.quantize], settings.quantize == "fp8")

        def estimator(width: int, height: int) -> MemoryEstimator:
            sized = settings.model_copy(update={"width": width, "height": height})
            sources, ranks = opened.sources(), opened.ranks_beside()
            # Context images have the size of the others.
            own = replace(spec, size=math.ceil(math.sqrt(width * height))) if self.is_pair else spec
            return MemoryEstimator(sized, own, sources, dtype, dtype, device.type == "cuda", ranks)

        self.encoding = self.sampling = estimator(*largest.size)
        of_samples = settings.width or spec.size, settings.height or spec.size
        if self.is_pair:
            of_samples = largest.size
        if settings.sample_prompts != () and of_samples != largest.size:
            self.sampling = estimator(*of_samples)
        self.weights: ModuleSize = self.encoding.transformer

    def of(self, checkpointing: bool, streamed: int) -> Forecast:
        """Forecast a training that is placed like this."""
        adapters = ADAPTER_BYTES * self.parameters
        encoding, sampling, weights = self.encoding, self.sampling, self.weights.on_device(streamed)
        tiled, autoencoder = self.settings.tiled, encoding.autoencoder
        stages = [
            Stage("encode images", autoencoder, encoding.decode[tiled]),
            Stage("encode texts", max(encoding.t5.total, encoding.clip), encoding.text),
            Stage("train", weights + adapters, self._activations(checkpointing)),
        ]
        if self.settings.sample_prompts != ():
            activations = max(sampling.denoise, sampling.decode[tiled])
            stages.append(Stage("sample", weights + adapters + autoencoder, activations))
        stages = [replace(stage, activations=stage.activations + encoding.workspace) for stage in stages]
        return Forecast(tuple(stages), streamed, checkpointing, self.parameters, self._seconds(checkpointing))

    def fitting(self) -> tuple[Forecast, int | None]:
        """Return the fastest forecast that fits the device and the settings, and the bytes that are free.

        Raises:
            InputError: None fits.
        """
        offload, free = self.settings.offload, available(self.device)
        blocks = len(self.weights.blocks)
        fixed = {"on": (True,), "off": (False,), "auto": (False, True)}[self.settings.checkpointing]
        ways = [(way, 0) for way in fixed]
        if offload == "blocks":
            ways = [(True, blocks)]
        elif offload == "auto":
            ways += [(True, streamed) for streamed in range(3, blocks + 1)]
        forecasts = (self.of(checkpointing, streamed) for checkpointing, streamed in ways)
        fitting = (f for f in forecasts if free is None or all(stage.fits(free) for stage in f.stages))
        if forecast := next(fitting, None):
            return forecast, free
        stage = self.of(*ways[-1]).largest
        at = f"{self.largest.width}x{self.largest.height} with {self.rows} at once"
        if stage.name == "sample":
            at = f"{self.sampling.width}x{self.sampling.height}"
        raise InputError(
            f"Got {(free or 0) / GIB:.1f} GiB of free memory on {self.device}, expected "
            f"{stage.needed / GIB:.1f} to {stage.name} at {at}: {ADVICE[stage.name]}"
        )

    @cache  # noqa: B019  (a forecaster lives as long as the start of a training)
    def _activations(self, checkpointing: bool) -> int:
        """Bytes of one training step beyond weights and factors, measured without any memory."""
        model = model_on_meta(self.spec.params, self.sources, self.format).requires_grad_(False)
        add_adapters(model, self.targets, 0, "meta")
        fused = partial(_Fused, self.device.type == "cuda")
        prepare_backward(model, self.first, checkpointing, fused)
        inputs, noise = self._inputs(), torch.empty(self._latent_shape(), device="meta")
        known = [*model.parameters(), *model.buffers(), noise]
        with torch.inference_mode(False), torch.enable_grad(), LiveBytes(known) as live, fused():
            velocity_loss(model, inputs, noise).sum().backward()
        # The gradients of the factors are counted with the factors.
        return live.peak - 4 * self.parameters

    def _latent_shape(self) -> tuple[int, int, int]:
        tokens = self.largest.width // 16 * (self.largest.height // 16)
        return self.rows, tokens, self.spec.params.in_channels

    def _inputs(self) -> Inputs:
        params, spec, latent = self.spec.params, self.spec, self._latent_shape()
        condition = Condition()
        if self.is_pair:
            context = torch.empty(latent, dtype=self.dtype, device="meta")
            condition = context_condition(context, *self.largest.size, "meta")
        rows, tokens, _ = latent

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        return Inputs(
            empty(*latent),
            empty(rows, tokens, 3, dtype=torch.float32),
            empty(rows, spec.text_length, params.context_in_dim),
            empty(rows, spec.text_length, 3, dtype=torch.float32),
            empty(rows),
            empty(rows, params.vec_in_dim),
            empty(rows) if params.guidance_embed else None,
            condition,
        )

    def _seconds(self, checkpointing: bool) -> float:
        """About how long a step takes, at the speed at which the device multiplies matrices.

        The backward pass costs as much as the forward pass, since only inputs and factors have gradients.
        """
        layers = self.spec.num_layers
        passes = (1 + checkpointing) * (layers - self.first) / layers + 1
        tokens = (1 + self.is_pair) * self._latent_shape()[1] + self.spec.text_length
        on_gpu = self.device.type == "cuda"
        speed = operations_per_second(self.dtype, self.device, 8192 if on_gpu else 1024)
        efficiency = EFFICIENCY["cuda" if on_gpu else "cpu"]
        return self.rows * passes * operations(self.spec, tokens) / (efficiency * speed)


def available(device: torch.device) -> int | None:
    """Return the bytes that a training may fill: of a GPU what is free, of this machine a share of all."""
    if device.type == "cuda":
        return free_memory(device)
    total = total_memory(device)
    return None if total is None else round(HOST_SHARE * total)
