"""Measures a denoising step of FLUX.1-dev at full size, with random weights: all our variants, and diffusers.

    python -m benchmarks.step_speed [--output benchmarks/results/step_speed.json] [--only WORDS] [--toy]

All variants share one set of weights, made on the device, and are interleaved; medians in milliseconds. Needs
a GPU with 60 GB and no network, and takes about six minutes. `--only fp8,diffusers` measures the variants
whose names contain one of the words. The variants "epilogues" need a Hopper GPU and the extra `hopper`.
`--toy` runs the same on a tiny model, on any machine. `--whole` adds the whole transformer compiled at once,
which may take minutes.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import (
    GIB,
    StepSize,
    check_full_size,
    full_step,
    machine,
    markdown,
    milliseconds,
    names_with,
    random_inputs,
    relative_error,
)
from benchmarks.diffusers_models import diffusers_step, diffusers_transformer
from benchmarks.random_weights import random_transformer
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.intervention import NOTHING, Intervention
from flux.model import Flux, Inputs, hopper_kernels
from flux.modules import ops
from flux.runtime.devices import pick_device
from flux.runtime.graphs import GraphRecorder
from flux.runtime.quantize import check_fp8_support, to_fp8
from flux.settings.command_line import run
from flux.specs import configs

# TFLOP/s that an H200 was measured to reach, for the floors.
LINEAR, LINEAR_FP8, ATTENTION = 750, 1310, 600
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BATCH = 4


def toy_step() -> StepSize:
    """Return the step of a tiny model."""
    small = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]}
    return StepSize(replace(configs["flux-dev"].params, **small), 64, 8, (0, 1, 2), rounds=3)


def tokens(size: StepSize) -> int:
    """Count the tokens of the image and the text."""
    return (size.side // 16) ** 2 + size.text


def floor_ms(size: StepSize, batch: int, fp8: bool) -> float:
    """Compute the time of a step's matrix products at the chip's own speed, in milliseconds.

    These are the attention and the linear layers of the blocks, without modulations.
    """
    p, rows = size.params, batch * tokens(size)
    weights = (p.depth + p.depth_single_blocks) * (4 + 2 * p.mlp_ratio) * p.hidden_size**2
    linear = 2 * rows * weights
    attention = 4 * rows * tokens(size) * p.hidden_size * (p.depth + p.depth_single_blocks)
    return (linear / (LINEAR_FP8 if fp8 else LINEAR) + attention / ATTENTION) / 1e9


class Bench:
    """Builds models and their steps, all with the same weights.

    Args:
        size: The size of the step.
        device: The device.
        backend: The backend of torch.compile.
    """

    def __init__(self, size: StepSize, device: torch.device, backend: str):
        self.size, self.device, self.backend = size, device, backend
        torch.manual_seed(0)
        self.weights = {n: x.to(device) for n, x in random_transformer(size.params, device).items()}

    def build(self, compiled: bool = False, fp8: bool = False, epilogues: bool = False) -> Flux:
        """Build our transformer."""
        with torch.device("meta"):
            model = Flux(self.size.params)
        model.load_state_dict(self.weights, assign=True)
        model.eval().requires_grad_(False)
        if fp8:
            to_fp8([model.double_blocks, model.single_blocks])
        if compiled:
            self.compile((*model.double_blocks, *model.single_blocks))
        if epilogues:
            model.compile_blocks(self.device)
        return model

    def compile(self, blocks: Iterable[nn.Module]) -> None:
        """Compile blocks as `Flux.compile_blocks` does, but for one shape each."""
        torch._dynamo.config.recompile_limit = 64
        ops.prepare_compiling()
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend=self.backend)

    def build_diffusers(self, compiled: bool = False) -> FluxTransformer2DModel:
        """Build diffusers' transformer."""
        model = diffusers_transformer(self.build())
        if compiled:
            self.compile((*model.transformer_blocks, *model.single_transformer_blocks))
        return model

    def inputs(self, batch: int = 1) -> Inputs:
        """Draw inputs that share one pooled text."""
        return random_inputs(self.size, batch, self.device)

    def ours(
        self, model: Flux, inputs: Inputs, in_advance: bool = True, intervention: Intervention = NOTHING
    ) -> Callable[[], Tensor]:
        """Make our step. Its modulations are computed in advance, as in sampling, or in the step."""
        mods = None
        if in_advance:
            guidance = None if inputs.guidance is None else inputs.guidance[:1]
            mods = model.modulations(inputs.timesteps[:1], inputs.y[:1], guidance)
        return lambda: model.observe(inputs, intervention=intervention, mods=mods)[0]

    def graphed(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the step as one CUDA graph, which is replayed."""
        for _ in range(3):
            step()
        replay = GraphRecorder()(step)
        # The graph reads the step's tensors where they are, so they must stay.
        return lambda: (replay(), step)[0]

    def whole(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Make our step with all blocks in one graph of the compiler, and in one CUDA graph."""
        return torch.compile(self.ours(self.build(), inputs), mode="reduce-overhead", fullgraph=True)


@dataclass(frozen=True)
class Variant:
    """One way to compute a step.

    Attributes:
        make: Prepares the step.
        batch: The number of images in it.
        in_8bit: Whether it computes in 8-bit floats.
    """

    make: Callable[[], Callable[[], Tensor]]
    batch: int = 1
    in_8bit: bool = False


def variants(bench: Bench, whole: bool) -> dict[str, Variant]:
    """Name the variants of a step, ours and diffusers'.

    Args:
        bench: Builds the models.
        whole: Whether all blocks are compiled at once too.
    """
    one, on_gpu = bench.inputs(), bench.device.type == "cuda"
    eager, compiled = bench.build(), bench.build(compiled=True)
    layers = frozenset(bench.size.layers)
    keeping = Intervention(keep=layers)
    injecting = Intervention(inject=eager.observe(one, intervention=keeping)[1].kept)
    found = {
        "ours eager": Variant(lambda: bench.ours(eager, one, in_advance=False)),
        "ours eager, modulations in advance": Variant(lambda: bench.ours(eager, one)),
        "diffusers eager": Variant(lambda: diffusers_step(bench.build_diffusers(), one)),
        "ours compiled": Variant(lambda: bench.ours(compiled, one, in_advance=False)),
        "ours compiled, modulations in advance": Variant(lambda: bench.ours(compiled, one)),
        "diffusers compiled": Variant(lambda: diffusers_step(bench.build_diffusers(True), one)),
        "reference, kept": Variant(lambda: bench.ours(compiled, one, intervention=keeping)),
        "edit of a kept reference": Variant(lambda: bench.ours(compiled, one, intervention=injecting)),
    }
    if on_gpu:
        found["ours compiled, CUDA graph"] = Variant(lambda: bench.graphed(bench.ours(compiled, one)))
    if on_gpu and whole:
        found["ours whole, reduce-overhead"] = Variant(lambda: bench.whole(one))
    found |= fp8_variants(bench, one, injecting)
    if hopper_kernels(bench.device):
        found |= epilogue_variants(bench, one, keeping, injecting)
    four = bench.inputs(BATCH)
    return found | {
        f"ours compiled, batch {BATCH}": Variant(lambda: bench.ours(compiled, four), BATCH),
        f"diffusers compiled, batch {BATCH}": Variant(
            lambda: diffusers_step(bench.build_diffusers(True), four), BATCH
        ),
    }


def fp8_variants(bench: Bench, one: Inputs, injecting: Intervention) -> dict[str, Variant]:
    """Name the variants of our step in 8-bit floats."""
    fp8 = bench.build(compiled=True, fp8=True)
    steps = {
        "fp8 eager": lambda: bench.ours(bench.build(fp8=True), one),
        "fp8 compiled": lambda: bench.ours(fp8, one),
        "fp8 edit of a kept reference": lambda: bench.ours(fp8, one, intervention=injecting),
    }
    if bench.device.type == "cuda":
        steps["fp8 compiled, CUDA graph"] = lambda: bench.graphed(bench.ours(fp8, one))
    return {name: Variant(make, in_8bit=True) for name, make in steps.items()}


def epilogue_variants(
    bench: Bench, one: Inputs, keeping: Intervention, injecting: Intervention
) -> dict[str, Variant]:
    """Name the variants of our step with fused epilogues, on Hopper GPUs."""
    fused, fp8 = (bench.build(epilogues=True, fp8=fp8) for fp8 in (False, True))
    four = bench.inputs(BATCH)
    return {
        "epilogues, modulations in the step": Variant(lambda: bench.ours(fused, one, in_advance=False)),
        "epilogues": Variant(lambda: bench.ours(fused, one)),
        "epilogues, reference, kept": Variant(lambda: bench.ours(fused, one, intervention=keeping)),
        "epilogues, edit of it": Variant(lambda: bench.ours(fused, one, intervention=injecting)),
        "epilogues, fp8": Variant(lambda: bench.ours(fp8, one), in_8bit=True),
        "epilogues, fp8, edit of it": Variant(
            lambda: bench.ours(fp8, one, intervention=injecting), in_8bit=True
        ),
        f"epilogues, batch {BATCH}": Variant(lambda: bench.ours(fused, four), BATCH),
    }


def parts(bench: Bench) -> dict[str, Callable[[], Tensor]]:
    """Name parts of a step: attention by kernel, and the second projection of a single block.

    The projection is one matmul of concatenated inputs, or two that are added.
    """
    p, n = bench.size.params, tokens(bench.size)
    draw = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    q, k, v = (draw(1, p.num_heads, n, p.hidden_size // p.num_heads) for _ in range(3))

    def attend(backend: SDPBackend | None) -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v)

    found: dict[str, Callable[[], Tensor]] = {"attention, torch's choice": partial(attend, None)}
    if bench.device.type == "cuda":
        found |= {f"attention, {name}": partial(attend, backend) for name, backend in BACKENDS.items()}
    kernels = hopper_kernels(bench.device)
    if kernels:
        found["attention, flash-attn-4"] = partial(kernels.attend, q, k, v)
    state, width = bench.build().single_blocks[0].state_dict(), p.hidden_size
    weight, bias = state["linear2.weight"], state["linear2.bias"]
    mixed, wide = draw(n, width), draw(n, 7 * width)

    def one() -> Tensor:
        mlp = F.gelu(wide[:, 3 * width :], approximate="tanh")
        return F.linear(torch.cat((mixed, mlp), dim=1), weight, bias)

    def two() -> Tensor:
        mlp = F.gelu(wide[:, 3 * width :], approximate="tanh")
        return torch.addmm(F.linear(mixed, weight[:, :width], bias), mlp, weight[:, width:].T)

    for name, make in {"joined": one, "two products": two}.items():
        found[f"linear2 eager, {name}"] = make
        found[f"linear2 compiled, {name}"] = torch.compile(make, backend=bench.backend)
    return found


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """Measure the memory that a step needs in addition."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def prepared(make: Callable[[], Callable]) -> tuple[Callable | None, dict]:
    """Prepare a step and warm it up. Return it with the time that this took, or None with the error."""
    begin = time.perf_counter()
    try:
        step = make()
        for _ in range(3):
            step()
    except Exception as error:  # the other numbers are still useful
        return None, {"error": f"{type(error).__name__}: {error}"[:1000]}
    return step, {"warm_up_s": time.perf_counter() - begin}


def measure(bench: Bench, chosen: dict[str, Variant]) -> tuple[dict[str, dict], dict[str, float]]:
    """Measure steps and their parts, interleaved.

    Returns:
        What was measured of each variant, and the median milliseconds of each part.
    """
    size, device = bench.size, bench.device
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Callable[[], Tensor]] = {}
    velocities: dict[str, Tensor] = {}
    for name, variant in chosen.items():
        step, found[name] = prepared(variant.make)
        found[name]["floor_ms"] = floor_ms(size, variant.batch, variant.in_8bit)
        if step:
            ready[name] = step
            found[name] |= {"peak_gib": peak_gib(step, device), "ms": []}
            # Copied, since the next replay of a CUDA graph overwrites its result.
            velocities[name] = step().float().cpu()
        print(name, found[name], flush=True)
    ready_parts = {name: prepared(lambda part=part: part)[0] for name, part in parts(bench).items()}
    times: dict[str, list[float]] = {name: [] for name, part in ready_parts.items() if part}
    for _ in range(size.rounds):
        for name, step in ready.items():
            step()  # so that no variant pays for the one before it
            found[name]["ms"].append(milliseconds(step, device))
        for name, part in ready_parts.items():
            if part:
                times[name].append(milliseconds(part, device))
    for name in ready:
        found[name]["median_ms"] = statistics.median(found[name]["ms"])
    add_errors(found, velocities)
    return found, {name: statistics.median(each) for name, each in times.items()}


def add_errors(found: dict[str, dict], velocities: dict[str, Tensor]) -> None:
    """Add each variant's relative error to ours and to diffusers', where these were measured."""
    for name, velocity in velocities.items():
        for base in ("ours eager", "diffusers compiled"):
            if base in velocities and velocities[base].shape == velocity.shape:
                found[name][f"error to {base}"] = relative_error(velocity, velocities[base])


@exit_on_input_error()
@torch.no_grad()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    backend: str = "inductor",
    only: str = "",
    whole: bool = False,
) -> None:
    """Run the benchmark.

    Args:
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        backend: backend of torch.compile
        only: measure only variants whose names contain one of these texts, with commas between them
        whole: add the whole transformer compiled at once
    """
    size, where = toy_step() if toy else full_step(), pick_device(device)
    check_full_size(where, toy)
    check_fp8_support(where, torch.bfloat16)
    bench = Bench(size, where, backend)
    known = variants(bench, whole)
    steps, part_ms = measure(bench, {name: known[name] for name in names_with(known, only)})
    if output:
        write_json(output, {"machine": machine(where), "side": size.side, "steps": steps, "parts": part_ms})
    print(
        "\n" + table(steps),
        markdown(["part", "ms"], [[n, f"{ms:.3f}"] for n, ms in part_ms.items()]),
        sep="\n\n",
    )


def table(found: dict[str, dict]) -> str:
    """Format the results."""
    rows = []
    for name, entry in found.items():
        ms = entry.get("median_ms")
        if ms is None:
            rows.append([name, entry["error"][:60], "-", "-", "-", "-"])
            continue
        _, batch, count = name.partition(", batch")
        theirs = found.get(f"diffusers compiled{batch}{count}", {}).get("median_ms")
        peak, error = entry["peak_gib"], entry.get("error to ours eager")
        rows.append(
            [
                name, f"{ms:.1f}", f"{theirs / ms:.2f}" if theirs else "-", f"{entry['floor_ms'] / ms:.0%}",
                "-" if peak is None else f"{peak:.2f}", "-" if error is None else f"{error:.4f}",
            ]
        )  # fmt: skip
    return markdown(["step", "ms", "to diffusers compiled", "of the floor", "GiB beside", "error"], rows)


if __name__ == "__main__":
    run(main, __doc__)
