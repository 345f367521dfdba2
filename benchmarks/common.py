"""Shared by all benchmarks: models of random weights, times and memory of steps, and tables."""

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from benchmarks.random_weights import write_random_model
from flux.errors import InputError
from flux.loaded_model import LoadedModel
from flux.model import FluxParams, Inputs
from flux.runs.record import versions
from flux.sampling import Conditioning, Step, VelocityModel, euler_step, image_ids
from flux.settings.complete import whole_tokens
from flux.settings.demos import ModelSettings
from flux.specs import VITAL_LAYERS_DEV, ModelSpec, configs
from flux.weights.headers import StoredTensor
from flux.weights.scales import ScaledTensor
from flux.weights.sources import TensorSource

GIB = 2**30
OTHERS = ("diffusers", "triton", "quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl")


def machine(device: torch.device) -> dict:
    """Describe the machine: date, device and versions, without which numbers mean nothing."""
    on_gpu = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU with {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {**versions(), **_others(), "cuda": torch.version.cuda},
    }


def names_with(names: Iterable[str], only: str) -> list[str]:
    """List the names that contain one of some texts, which have commas between them.

    Raises:
        InputError: No name does.
    """
    names, texts = list(names), [text.strip() for text in only.split(",")]
    found = [name for name in names if any(text in name for text in texts)]
    if not found:
        raise InputError(f"Got only {only!r}, which none of these contains: {'; '.join(names)}")
    return found


def _others() -> dict[str, str]:
    """Find the versions of optional packages that a measurement depends on."""
    found = {}
    for name in OTHERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Time a step, on a GPU by its own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class PassClock:
    """Records when each pass through a transformer ends, while the `with` block lasts.

    On a GPU it records events, so that nothing waits for the clock.

    Args:
        last: The transformer's last module.
        device: The device of the transformer.
    """

    def __init__(self, last: nn.Module, device: torch.device):
        self.last, self.on_gpu = last, device.type == "cuda"
        self.marks: list[Any] = []  # seconds, or events of the GPU
        self.peak_gib: float | None = None

    def __enter__(self) -> "PassClock":
        self.hook = self.last.register_forward_hook(self._mark)
        return self

    def __exit__(self, *error) -> None:
        self.hook.remove()

    def _mark(self, *_) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB
        else:
            self.marks.append(time.perf_counter())

    def step_ms(self, passes: int) -> dict[str, float]:
        """Compute the milliseconds between the ends of successive steps of so many passes."""
        if self.on_gpu:
            torch.cuda.synchronize()
        ends = self.marks[passes - 1 :: passes]
        between = [a.elapsed_time(b) if self.on_gpu else 1000 * (b - a) for a, b in pairwise(ends)]
        return {"median": statistics.median(between), "min": min(between), "max": max(between)}


def peak_gib(device: torch.device) -> float:
    """Return the GPU memory at its peak since the last reset, in GiB."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def clean(device: torch.device) -> None:
    """Free memory and reset its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def source_of(kind: str, shape: torch.Size, nbytes: int) -> TensorSource:
    """Describe a tensor as if a file held it in that form."""
    return TensorSource((ScaledTensor(StoredTensor(Path("random"), kind, tuple(shape), 0, nbytes)),))


def sources_of(weights: Mapping[str, Tensor]) -> dict[str, TensorSource]:
    """Describe tensors as if a file held them in bfloat16."""
    return {name: source_of("BF16", x.shape, 2 * x.numel()) for name, x in weights.items()}


def relative_error(a: Tensor, b: Tensor) -> float:
    """Compute the norm of the difference relative to the norm of `b`."""
    return ((a - b).norm() / b.norm()).item()


@torch.inference_mode()
def velocity_error(model: VelocityModel, steps: Sequence[Step], ids: Tensor, cond: Conditioning) -> float:
    """Average the relative error of a model's velocity over the steps of another model."""
    errors = []
    for step in steps:
        velocity = euler_step(model, step.noisy, ids, cond, step.t, step.t_next).velocity
        errors.append(relative_error(velocity, step.velocity))
    return statistics.mean(errors)


# ---- single steps


@dataclass(frozen=True)
class StepSize:
    """The size of a single step.

    Attributes:
        params: The sizes of the transformer.
        side: The side of the image in pixels.
        text: The number of text tokens.
        layers: The layers whose keys and values are kept and injected.
        rounds: How many times each step is timed.
    """

    params: FluxParams
    side: int
    text: int
    layers: tuple[int, ...]
    rounds: int


def full_step() -> StepSize:
    """Return FLUX.1-dev's step of 1024x1024."""
    return StepSize(configs["flux-dev"].params, 1024, 512, VITAL_LAYERS_DEV, rounds=10)


def random_inputs(size: StepSize, batch: int, device: torch.device) -> Inputs:
    """Draw inputs of the transformer on the CPU, the same in all processes."""
    p, generator = size.params, torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    ones = torch.ones(batch, device=device, dtype=torch.bfloat16)
    ids = image_ids(batch, size.side, size.side, device)
    return Inputs(
        img=draw(batch, ids.shape[1], p.in_channels),
        img_ids=ids,
        txt=draw(batch, size.text, p.context_in_dim),
        txt_ids=torch.zeros(batch, size.text, 3, device=device),
        timesteps=0.5 * ones,
        y=draw(1, p.vec_in_dim).expand(batch, -1),
        guidance=3.5 * ones,
    )


# ---- whole runs


PROMPT = "a photo of a dog on the grass"
EDITS = ["a photo of a cat on the grass", "a photo of a dog on the beach", "a photo of a white dog"]
GUIDANCE = 3.5


@dataclass(frozen=True)
class Work:
    """One thing to measure.

    Attributes:
        name: Its name in the results.
        width: The width of the images in pixels.
        height: The height of the images in pixels.
        steps: The number of steps.
        at_once: The number of edits in one batch. If 0, a single image is generated.
        diffusers_rows: The rows of diffusers' batch. For edits, they are the reference and the edits.
    """

    name: str
    width: int
    height: int
    steps: int
    at_once: int = 0
    diffusers_rows: int = 1


@dataclass(frozen=True)
class RunPlan:
    """A model of random weights and what is measured with it.

    Attributes:
        model: The name of the model.
        spec: Its spec.
        dtype: The dtype that it runs in.
        layers: The layers that edits inject in.
        work: What is measured.
    """

    model: str
    spec: ModelSpec
    dtype: Literal["float32", "bfloat16"]
    layers: tuple[int, ...]
    work: list[Work]


def full_plan() -> RunPlan:
    """Plan FLUX.1-dev at full size."""
    spec = configs["flux-dev"]
    wide, high = whole_tokens(1080, "width"), whole_tokens(720, "height")
    # Another size comes last: compiled blocks are specialised to the first size, and general after that.
    work = [
        Work("1024x1024", 1024, 1024, steps=12),
        Work("1024x1024, 3 edits one by one", 1024, 1024, steps=6, at_once=1, diffusers_rows=4),
        Work("1024x1024, 3 edits at once", 1024, 1024, steps=6, at_once=3, diffusers_rows=4),
        Work(f"1080x720 ({wide}x{high})", wide, high, steps=12),
    ]
    return RunPlan("flux-dev", spec, "bfloat16", VITAL_LAYERS_DEV, work)


def toy_plan() -> RunPlan:
    """Plan the same on a tiny model."""
    dev = configs["flux-dev"]
    sizes = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6]}
    spec = replace(
        dev,
        params=replace(dev.params, **sizes, vec_in_dim=8, context_in_dim=16),
        ae_params=replace(dev.ae_params, ch=8, num_res_blocks=1, num_groups=4),
        text_length=16,
    )
    work = [
        Work("64x64", 64, 64, steps=3),
        Work("64x64, 3 edits one by one", 64, 64, steps=3, at_once=1, diffusers_rows=4),
        Work("64x64, 3 edits at once", 64, 64, steps=3, at_once=3, diffusers_rows=4),
        Work("96x48", 96, 48, steps=3),
    ]
    return RunPlan("toy", spec, "float32", (0, 1, 3), work)


@contextmanager
def known(plan: RunPlan) -> Iterator[None]:
    """Let the plan's model be loaded by its name, while the block lasts."""
    before = dict(configs)
    configs[plan.model] = plan.spec
    try:
        yield
    finally:
        configs.clear()
        configs.update(before)


def words_of(texts: Sequence[str]) -> set[str]:
    """Split texts into their words."""
    return {word for text in texts for word in text.split()}


def check_full_size(device: torch.device, toy: bool) -> None:
    """Raise InputError unless there is a GPU for FLUX.1 at full size, before its files are written."""
    if not toy and device.type != "cuda":
        raise InputError(
            f"Got the device {device}, but this benchmark runs FLUX.1 at full size: use a GPU, or --toy"
        )


def load_random(plan: RunPlan, folder: str | Path, device: torch.device) -> tuple[LoadedModel, float]:
    """Write random weights into the folder, if they are not there, and load them as a user would.

    Returns:
        The pipeline, and the seconds that writing took.
    """
    begin = time.perf_counter()
    words = words_of([PROMPT, *EDITS])
    files = write_random_model(Path(folder) / plan.model, plan.spec, words, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    written = time.perf_counter() - begin
    settings = ModelSettings(
        model=plan.model,
        weights=str(files.flow),
        ae_weights=str(files.ae),
        text_encoders=str(files.text),
        device=str(device),
        dtype=plan.dtype,
    )
    with known(plan):
        return LoadedModel.load(settings), written


def start_processes(benchmark: str, count: int) -> NoReturn:
    """Start this benchmark again through torchrun, in so many processes, and end with its exit status."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    sys.exit(subprocess.run([sys.executable, *torchrun, "-m", benchmark, *sys.argv[1:]]).returncode)


# ---- tables


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a table in Markdown, with columns aligned for a terminal."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )
