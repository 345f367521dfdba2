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
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
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
from benchmarks.diffusers_peer import peer_step, peer_transformer
from benchmarks.random_weights import random_transformer
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.intervention import NOTHING, Intervention
from flux.model import Flux, Inputs, hopper_kernels
from flux.modules import ops
from flux.runtime.devices import pick_device
from flux.runtime.quantize import check_fp8_support, to_fp8
from flux.settings.command_line import run
from flux.specs import configs

# TFLOP/s that one H200 reaches in practice, for the floors.
LINEAR, LINEAR_FP8, ATTENTION = 750, 1310, 600
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BATCH = 4


def toy_step() -> StepSize:
    """Returns the step of a tiny model."""
    small = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]}
    return StepSize(replace(configs["flux-dev"].params, **small), 64, 8, (0, 1, 2), rounds=3)


def tokens(size: StepSize) -> int:
    """Counts the tokens of the image and the text."""
    return (size.side // 16) ** 2 + size.text


def floor_ms(size: StepSize, batch: int, fp8: bool) -> float:
    """Computes the time of a step's matrix products at the chip's own speed, in milliseconds.

    These are the attention and the linear layers of the blocks, without modulations.
    """
    p, rows = size.params, batch * tokens(size)
    weights = (p.depth + p.depth_single_blocks) * (4 + 2 * p.mlp_ratio) * p.hidden_size**2
    linear = 2 * rows * weights
    attention = 4 * rows * tokens(size) * p.hidden_size * (p.depth + p.depth_single_blocks)
    return (linear / (LINEAR_FP8 if fp8 else LINEAR) + attention / ATTENTION) / 1e9


class Bench:
    """Builds the variants, all with the same weights.

    Args:
        size: The size of the step.
        device: The device.
        backend: The backend of torch.compile.
        whole: Whether to compile all blocks at once too, which may take minutes.
    """

    def __init__(self, size: StepSize, device: torch.device, backend: str, whole: bool):
        self.size, self.device, self.backend, self.whole = size, device, backend, whole
        torch.manual_seed(0)
        self.weights = {n: x.to(device) for n, x in random_transformer(size.params, device).items()}

    def build(self, compiled: bool = False, fp8: bool = False, epilogues: bool = False) -> Flux:
        """Builds our transformer."""
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
        """Compiles blocks as `Flux.compile_blocks` does, but for one shape each."""
        torch._dynamo.config.recompile_limit = 64
        ops.prepare_compiling()
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend=self.backend)

    def build_peer(self, compiled: bool = False) -> FluxTransformer2DModel:
        """Builds diffusers' transformer."""
        peer = peer_transformer(self.build())
        if compiled:
            self.compile((*peer.transformer_blocks, *peer.single_transformer_blocks))
        return peer

    def inputs(self, batch: int = 1) -> Inputs:
        """Draws inputs that share one pooled text."""
        return random_inputs(self.size, batch, self.device)

    def ours(
        self, model: Flux, inputs: Inputs, ahead: bool = False, intervention: Intervention = NOTHING
    ) -> Callable:
        """Makes our step. With `ahead`, its modulations are computed in advance."""
        mods = None
        if ahead:
            guidance = None if inputs.guidance is None else inputs.guidance[:1]
            mods = model.modulations(inputs.timesteps[:1], inputs.y[:1], guidance)
        return lambda: model.observe(inputs, intervention=intervention, mods=mods)[0]

    def graphed(self, step: Callable) -> Callable:
        """Records the step as one CUDA graph, which is replayed."""
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        # The graph reads the step's tensors where they are, so they must stay.
        return lambda: (graph.replay(), result, step)[1]

    def variants(self) -> dict[str, tuple[Callable[[], Callable], int, bool]]:
        """Names the variants: what prepares the step, the images in it, and whether it computes in 8 bits."""
        one, four, on_gpu = self.inputs(), self.inputs(BATCH), self.device.type == "cuda"
        eager, compiled = self.build(), self.build(compiled=True)
        layers = frozenset(self.size.layers)
        kept = eager.observe(one, intervention=Intervention(keep=layers))[1].kept
        keeping, injecting = Intervention(keep=layers), Intervention(inject=kept)

        def whole() -> Callable:
            # All blocks in one graph of the compiler, and in one CUDA graph.
            step = self.ours(self.build(), one, ahead=True)
            return torch.compile(step, mode="reduce-overhead", fullgraph=True)

        variants = {
            "ours eager": (lambda: self.ours(eager, one), 1, False),
            "ours eager, modulations ahead": (lambda: self.ours(eager, one, True), 1, False),
            "diffusers eager": (lambda: peer_step(self.build_peer(), one), 1, False),
            "ours compiled": (lambda: self.ours(compiled, one), 1, False),
            "ours compiled, modulations ahead": (lambda: self.ours(compiled, one, True), 1, False),
            "diffusers compiled": (lambda: peer_step(self.build_peer(True), one), 1, False),
            "reference, kept": (lambda: self.ours(compiled, one, True, keeping), 1, False),
            "edit of a kept reference": (lambda: self.ours(compiled, one, True, injecting), 1, False),
        }
        if on_gpu:
            variants |= {
                "ours compiled, CUDA graph": (
                    lambda: self.graphed(self.ours(compiled, one, True)), 1, False
                ),
            }  # fmt: skip
            if self.whole:
                variants["ours whole, reduce-overhead"] = (whole, 1, False)
        fp8 = self.build(compiled=True, fp8=True)
        variants |= {
            "fp8 eager": (lambda: self.ours(self.build(fp8=True), one, True), 1, True),
            "fp8 compiled": (lambda: self.ours(fp8, one, True), 1, True),
            "fp8 edit of a kept reference": (lambda: self.ours(fp8, one, True, injecting), 1, True),
        }
        if on_gpu:
            variants["fp8 compiled, CUDA graph"] = (lambda: self.graphed(self.ours(fp8, one, True)), 1, True)
        if hopper_kernels(self.device):
            joined, fp8_joined = (self.build(epilogues=True, fp8=fp8) for fp8 in (False, True))
            variants |= {
                "epilogues, modulations in the step": (lambda: self.ours(joined, one), 1, False),
                "epilogues": (lambda: self.ours(joined, one, True), 1, False),
                "epilogues, reference, kept": (lambda: self.ours(joined, one, True, keeping), 1, False),
                "epilogues, edit of it": (lambda: self.ours(joined, one, True, injecting), 1, False),
                "epilogues, fp8": (lambda: self.ours(fp8_joined, one, True), 1, True),
                "epilogues, fp8, edit of it": (lambda: self.ours(fp8_joined, one, True, injecting), 1, True),
                f"epilogues, batch {BATCH}": (lambda: self.ours(joined, four, True), BATCH, False),
            }
        return variants | {
            f"ours compiled, batch {BATCH}": (lambda: self.ours(compiled, four, True), BATCH, False),
            f"diffusers compiled, batch {BATCH}": (
                lambda: peer_step(self.build_peer(True), four),
                BATCH,
                False,
            ),
        }

    def parts(self) -> dict[str, Callable]:
        """Names parts of a step: attention by kernel, and the second projection of a single block.

        The projection is one matrix product of joined inputs, or two that are added.
        """
        p, n = self.size.params, tokens(self.size)
        draw = partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        q, k, v = (draw(1, p.num_heads, n, p.hidden_size // p.num_heads) for _ in range(3))

        def attend(backend: SDPBackend | None) -> Tensor:
            with sdpa_kernel(backend) if backend else nullcontext():
                return F.scaled_dot_product_attention(q, k, v)

        parts = {"attention, torch's choice": partial(attend, None)}
        if self.device.type == "cuda":
            parts |= {f"attention, {name}": partial(attend, backend) for name, backend in BACKENDS.items()}
        epilogues = hopper_kernels(self.device)
        if epilogues:
            parts["attention, flash-attn-4"] = partial(epilogues.attend, q, k, v)
        linear, width = self.build().single_blocks[0].linear2, p.hidden_size
        mixed, wide = draw(n, width), draw(n, 7 * width)
        joined, left, right = linear.weight, linear.weight[:, :width], linear.weight[:, width:]

        def one() -> Tensor:
            mlp = F.gelu(wide[:, 3 * width :], approximate="tanh")
            return F.linear(torch.cat((mixed, mlp), dim=1), joined, linear.bias)

        def two() -> Tensor:
            mlp = F.gelu(wide[:, 3 * width :], approximate="tanh")
            return torch.addmm(F.linear(mixed, left, linear.bias), mlp, right.T)

        for name, make in {"joined": one, "two products": two}.items():
            parts[f"linear2 eager, {name}"] = make
            parts[f"linear2 compiled, {name}"] = torch.compile(make, backend=self.backend)
        return parts


def peak_gib(step: Callable[[], object], device: torch.device) -> float | None:
    """Measures the memory that a step needs in addition."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def prepared(make: Callable[[], Callable]) -> tuple[Callable | None, dict]:
    """Prepares a step and warms it up. Returns it with the time that this took, or None with the error."""
    begin = time.perf_counter()
    try:
        step = make()
        for _ in range(3):
            step()
    except Exception as error:  # the other numbers are still useful
        return None, {"error": f"{type(error).__name__}: {error}"[:1000]}
    return step, {"warm_up_s": time.perf_counter() - begin}


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
    """Runs the benchmark.

    Args:
        output: JSON file to write to; if not set, one in output/benchmarks
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        backend: backend of torch.compile
        only: measure only variants whose names contain one of these texts, with commas between them
        whole: add the whole transformer compiled at once
    """
    size, where = toy_step() if toy else full_step(), pick_device(device)
    check_full_size(where, toy)
    check_fp8_support(where, torch.bfloat16)
    bench = Bench(size, where, backend, whole)
    variants = bench.variants()
    chosen = {name: variants[name] for name in names_with(variants, only)}
    results: dict[str, Any] = {"machine": machine(where), "side": size.side, "steps": {}, "parts": {}}
    ready: dict[str, Callable] = {}
    found = results["steps"]
    for name, (make, batch, in_8bit) in chosen.items():
        step, found[name] = prepared(make)
        found[name]["floor_ms"] = floor_ms(size, batch, in_8bit)
        if step:
            ready[name] = step
            found[name] |= {"peak_gib": peak_gib(step, where), "ms": []}
            # The next replay of a CUDA graph overwrites its result.
            found[name]["answer"] = step().float().cpu()
        print(name, {key: value for key, value in found[name].items() if key != "answer"}, flush=True)
    parts = {name: prepared(lambda make=make: make)[0] for name, make in bench.parts().items()}
    times = {name: [] for name, part in parts.items() if part}
    for _ in range(size.rounds):
        for name, step in ready.items():
            step()  # so that no variant pays for the one before it
            found[name]["ms"].append(milliseconds(step, where))
        for name in times:
            times[name].append(milliseconds(parts[name], where))
    results["parts"] = {name: statistics.median(each) for name, each in times.items()}
    answers = {name: entry.pop("answer") for name, entry in found.items() if "answer" in entry}
    for name, answer in answers.items():
        same = [other for other in ("ours eager", "diffusers compiled") if answers.get(other) is not None]
        for other in (one for one in same if answers[one].shape == answer.shape):
            found[name][f"error to {other}"] = relative_error(answer, answers[other])
        found[name]["median_ms"] = statistics.median(found[name]["ms"])
    if output:
        write_json(output, results)
    print(
        table(found),
        markdown(["part", "ms"], [[n, f"{ms:.3f}"] for n, ms in results["parts"].items()]),
        sep="\n\n",
    )


def table(found: dict[str, dict]) -> str:
    """Formats the results."""
    rows = []
    for name, entry in found.items():
        ms = entry.get("median_ms")
        if ms is None:
            rows.append([name, entry["error"][:60], "-", "-", "-", "-"])
            continue
        alone = name.rsplit(", batch", 1)
        peer = found.get("diffusers compiled" + "".join(f", batch{batch}" for batch in alone[1:]), {})
        ratio, peak = peer.get("median_ms"), entry["peak_gib"]
        error = entry.get("error to ours eager")
        rows.append(
            [
                name, f"{ms:.1f}", f"{ratio / ms:.2f}" if ratio else "-", f"{entry['floor_ms'] / ms:.0%}",
                "-" if peak is None else f"{peak:.2f}", "-" if error is None else f"{error:.4f}",
            ]
        )  # fmt: skip
    return markdown(["step", "ms", "to diffusers compiled", "of the floor", "GiB beside", "error"], rows)


if __name__ == "__main__":
    run(main, __doc__)
