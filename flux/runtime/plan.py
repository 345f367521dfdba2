"""Choose where the models of a run are placed, so that the run fits into the device's memory."""

import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from flux.errors import InputError, warn
from flux.runtime.devices import main_memory, total_memory
from flux.runtime.estimate import MemoryEstimator, steering_tokens
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec
from flux.weights.open_model import OpenModel

MIB, GIB = 2**20, 2**30
# Free memory that a stage must leave: for what kernels allocate on the side, and for fragments too small for
# the allocator to use, which grow with what is allocated (`benchmarks.memory`: 0.3 to 1.5 GiB of 8 to 24).
SLACK, WEIGHT_MARGIN, ACTIVATION_MARGIN = 512 * MIB, 1.04, 1.15
ALL_BLOCKS = sys.maxsize
SLOW_STEP_S = 30.0


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Attributes:
        name: "text", "denoise" or "decode".
        weights: Bytes of the weights that are on the device meanwhile.
        activations: Bytes of everything else.
    """

    name: str
    weights: int
    activations: int

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device."""
        return self.weights + self.activations

    @property
    def needed(self) -> int:
        """Free bytes that guarantee that the stage runs."""
        return round(WEIGHT_MARGIN * self.weights + ACTIVATION_MARGIN * self.activations) + SLACK

    def fits(self, free: int) -> bool:
        """Return whether `free` bytes are enough."""
        return self.needed <= free


@dataclass(frozen=True)
class Plan:
    """Where the models are placed, and how much device memory each stage then needs.

    Attributes:
        offload: "none" keeps all models on the device, "model" each one while it computes, and "blocks" also
            streams blocks.
        streamed: Number of transformer blocks that are streamed, at most.
        streamed_t5: Number of T5 blocks that are streamed, at most.
        tiled: Whether images are decoded and encoded in tiles.
        stages: The stages of the run. Empty if the settings name the plan, which then needs no estimate.
    """

    offload: Literal["none", "model", "blocks"]
    streamed: int
    streamed_t5: int
    tiled: bool
    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(
        cls,
        estimate: MemoryEstimator,
        offload: Literal["none", "model", "blocks"],
        streamed: int = 0,
        streamed_t5: int = 0,
        tiled: bool = False,
    ) -> "Plan":
        """Return the plan with these choices and the memory it needs."""
        weights = weights_by_stage(estimate, streamed, streamed_t5)
        activations = {"text": estimate.text, "denoise": estimate.denoise, "decode": estimate.decode[tiled]}
        # Without offloading, the autoencoder is on the device while the next images are denoised.
        if estimate.workload.decodes_alongside and offload == "none":
            activations["denoise"] += activations["decode"]
        if estimate.workload.keeps_streams:
            activations["denoise"] += estimate.streams
            activations["decode"] += estimate.streams
        held = estimate.workspace
        if offload == "none":
            weights = dict.fromkeys(weights, sum(weights.values()))
            held += estimate.recorded
        stages = (Stage(name, weights[name], activations[name] + held) for name in weights)
        return cls(offload, streamed, streamed_t5, tiled, tuple(stages))

    @classmethod
    def fitting(cls, estimate: MemoryEstimator, free: int) -> "Plan":
        """Return the fastest plan that fits into `free` bytes.

        All models stay on the device if they fit. Else they come one at a time, and as few blocks as possible
        are streamed. Tiles change the image slightly and are used only if needed.

        Raises:
            InputError: If not even the smallest plan fits.
        """
        for tiled in (True,) if estimate.settings.tiled else (False, True):
            plan = cls.of(estimate, "none", tiled=tiled)
            if plan.fits(free):
                return plan
        blocks, t5_blocks = len(estimate.transformer.blocks), len(estimate.t5.blocks)
        # Two buffers take the place of the streamed blocks: memory is saved from the third block on.
        fewest = (n for n in (0, *range(3, blocks)) if cls.of(estimate, "blocks", n)["denoise"].fits(free))
        one_by_one = cls.of(estimate, "model")
        streamed = next(fewest, blocks)
        streamed_t5 = 0 if one_by_one["text"].fits(free) else t5_blocks
        tiled = estimate.settings.tiled or not one_by_one["decode"].fits(free)
        offload = "blocks" if streamed or streamed_t5 else "model"
        plan = cls.of(estimate, offload, streamed, streamed_t5, tiled)
        if not plan.fits(free):
            stage = plan.largest
            raise InputError(
                f"Got {free / GIB:.1f} GiB of free memory on the device, expected {stage.needed / GIB:.1f} "
                f"({stage.name}, {estimate.width}x{estimate.height}, batch_size {estimate.workload.batch}): "
                "make the image or the batch smaller"
            )
        return plan

    def __getitem__(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def fits(self, free: int) -> bool:
        """Return whether `free` bytes are enough for every stage."""
        return all(stage.fits(free) for stage in self.stages)

    @property
    def largest(self) -> Stage:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def peak(self) -> int:
        """Bytes of tensors on the device at most, within a tenth."""
        return max(stage.peak for stage in self.stages)


def check_size(
    settings: ModelSettings, spec: ModelSpec, dtype: torch.dtype, device: torch.device, gpus: int = 1
) -> None:
    """Check that the memory of the device can hold images of that size, whatever its weights take.

    Args:
        settings: The run.
        spec: Its model.
        dtype: Type of the transformer and the autoencoder.
        device: Where they compute.
        gpus: Number of GPUs that share each image.

    Raises:
        InputError: It cannot: what a block, or the decoder's last layer, reads and writes does not fit.
    """
    width, height = (side or spec.size for side in (settings.width, settings.height))
    # Of one image: a batch may be smaller than batch_size.
    tokens = ((width // 16) * (height // 16) + steering_tokens(settings, spec)[0]) // gpus
    # A single-stream block holds its stream, and the queries, keys, values and MLP made of it.
    numbers = [tokens * spec.params.hidden_size * (4 + int(spec.params.mlp_ratio))]
    if not settings.tiled and settings.offload != "auto":
        numbers.append(2 * width * height * spec.ae_params.ch)
    needed, memory = max(numbers) * dtype.itemsize, total_memory(device)
    if memory is not None and needed > memory:
        raise InputError(
            f"Got {width}x{height}, which needs more than {needed / GIB:.0f} GiB of memory, and {device} has "
            f"{memory / GIB:.0f}: make the image smaller"
        )


def warn_of_slow_steps(
    settings: ModelSettings, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> None:
    """Warn of a run on a CPU whose steps take long. Its speed is that of a multiplication of two matrices."""
    if device.type != "cpu":
        return
    width, height = (side or spec.size for side in (settings.width, settings.height))
    tokens = (width // 16) * (height // 16) + steering_tokens(settings, spec)[0]
    step = operations(spec, tokens) / operations_per_second(dtype)
    step *= 2 if (settings.true_cfg or spec.true_cfg) > 1 else 1
    if step > SLOW_STEP_S:
        whole = step * (settings.num_steps or spec.num_steps)
        warn(
            f"On this CPU a step of {width}x{height} takes about {duration(step)}, an image about "
            f"{duration(whole)}: make it smaller, or use a GPU"
        )


def operations(spec: ModelSpec, tokens: int) -> float:
    """Return the floating-point operations of a step: of the linear layers, and of attention."""
    width = spec.params.hidden_size
    linear = 2 * tokens * (4 + 2 * spec.params.mlp_ratio) * width**2
    return spec.num_layers * (linear + 4 * tokens**2 * width)


@cache
def operations_per_second(dtype: torch.dtype, device: torch.device | str = "cpu", side: int = 1024) -> float:
    """Return the operations a second of multiplying matrices, "side side": measured once, best of three."""
    seconds, x = [], torch.ones(side, side, dtype=dtype, device=device)
    for _ in range(3):
        begin = time.perf_counter()
        torch.mm(x, x)
        if x.is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * side**3 / min(seconds)


def duration(seconds: float) -> str:
    """Say about how long something takes: "90 seconds", "3 minutes", "2 hours"."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"


def make_plan(
    settings: ModelSettings,
    model: OpenModel,
    dtype: torch.dtype,
    text_dtype: torch.dtype,
    device: torch.device,
) -> Plan:
    """Return the plan that the settings name. For "auto", prints and returns one that fits into free memory.

    Raises:
        InputError: If the settings say "auto" and no plan fits, or if the weights alone do not fit.
    """
    on_gpu = device.type == "cuda"
    sources, ranks = model.sources(), model.ranks_beside()
    estimate = MemoryEstimator(settings, model.spec, sources, dtype, text_dtype, on_gpu, ranks)
    free = free_memory(device)
    if settings.offload != "auto":
        streamed = ALL_BLOCKS if settings.offload == "blocks" else 0
        plan = Plan(settings.offload, streamed, streamed, settings.tiled)
    else:
        # A device without memory of its own shares the host's: offloading saves none.
        on_device = Plan.of(estimate, "none", tiled=settings.tiled)
        plan = on_device if free is None else Plan.fitting(estimate, free)
        print(describe_plan(plan, estimate, free))
    check_weights(plan, estimate, free)
    return plan


def weights_by_stage(estimate: MemoryEstimator, streamed: int, streamed_t5: int) -> dict[str, int]:
    """Return the bytes of the weights that each stage needs on the device, while so many blocks stream."""
    return {
        "text": estimate.t5.on_device(streamed_t5) + estimate.clip,
        "denoise": estimate.transformer.on_device(streamed),
        "decode": estimate.autoencoder,
    }


def check_weights(plan: Plan, estimate: MemoryEstimator, free: int | None) -> None:
    """Check that the weights fit where a plan puts them, whatever the run takes beside them.

    Args:
        plan: The plan.
        estimate: The sizes of the weights.
        free: Free bytes on the GPU. If None, the models compute in main memory.

    Raises:
        InputError: They do not. The system would end the program half-way.
    """
    settings, memory = estimate.settings, main_memory()
    if free is not None:
        blocks = min(plan.streamed, len(estimate.transformer.blocks))
        stages = weights_by_stage(estimate, blocks, min(plan.streamed_t5, len(estimate.t5.blocks))).values()
        needed = sum(stages) if plan.offload == "none" else max(stages)
        if needed > free:
            raise InputError(
                f"Got {free / GIB:.1f} GiB of free memory on the GPU for weights of {needed / GIB:.1f} GiB: "
                'give offload "auto"'
            )
    in_main = {
        "transformer": settings.quantize != "none",
        "text_encoder_2": settings.t5 != "same",
        "text_encoder": False,
        "vae": False,
    }
    everything = free is None or plan.offload != "none"
    waiting = sum(size for part, size in estimate.loaded.items() if everything or in_main[part])
    if memory is not None and waiting > memory:
        raise InputError(
            f"Got weights that take {waiting / GIB:.1f} GiB of main memory, and this machine has "
            f"{memory / GIB:.1f}: take smaller files, such as GGUF or fp8, of the transformer and of T5"
        )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that this process may still allocate on a GPU. None if the device is no GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    # This function alone rejects a device without an index. It takes None for the current one.
    allowed = torch.cuda.get_per_process_memory_fraction(device.index) * total
    return round(min(free + reserved, allowed) - allocated)


def describe_plan(plan: Plan, estimate: MemoryEstimator, free: int | None) -> str:
    """Return one line that says where the models are placed and how much memory that needs at most."""
    parts = ["all models stay on the device" if plan.offload == "none" else "each model comes when it works"]
    if plan.streamed:
        parts.append(f"{plan.streamed} of {len(estimate.transformer.blocks)} transformer blocks are streamed")
    if plan.streamed_t5:
        parts.append("T5's blocks are streamed")
    if plan.tiled:
        parts.append("images are decoded in tiles")
    of_free = "" if free is None else f" of {free / GIB:.1f}"
    return f"memory: {', '.join(parts)}; at most {plan.peak / GIB:.1f}{of_free} GiB, to {plan.largest.name}"
