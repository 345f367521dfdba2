"""A denoising step of FLUX.1-dev at full size, with random weights: every way we have, beside diffusers.

    python -m benchmarks.step_speed [--output benchmarks/results/step_speed.json] [--only WORDS] [--toy]

One batch of weights, made on the device, serves all ways, which take turns; medians in milliseconds. Needs a
GPU with 60 GB and no network, and is meant to be done in six minutes. `--only fp8,diffusers` measures those
whose names hold one of the words; "epilogues" are there on a Hopper card with the extra `hopper`. `--toy` is
the same on a tiny model, on any machine; `--whole` adds the whole transformer compiled as one, which may take
minutes.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import fire
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.diffusers_peer import peer_transformer
from benchmarks.full_size import relative_error
from benchmarks.random_weights import random_transformer
from benchmarks.report import GIB, machine, markdown, milliseconds
from flux import sampling
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.intervention import NOTHING, Intervention
from flux.model import Flux, FluxParams, with_epilogues
from flux.modules import ops
from flux.runtime.devices import pick_device
from flux.runtime.quantize import check_device, to_fp8
from flux.specs import configs

# TFLOP/s that one H200 really gives, for the floors.
LINEAR, LINEAR_FP8, ATTENTION = 750, 1310, 600
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BATCH = 4


@dataclass(frozen=True)
class Size:
    params: FluxParams
    side: int
    text: int
    layers: tuple[int, ...]
    rounds: int


def full_size() -> Size:
    dev = configs["flux-dev"]
    return Size(dev.params, 1024, 512, dev.vital_layers, rounds=10)


def toy_size() -> Size:
    small = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]}
    return Size(replace(configs["flux-dev"].params, **small), 64, 8, (0, 1, 2), rounds=3)


def tokens(size: Size) -> int:
    return (size.side // 16) ** 2 + size.text


def floor_ms(size: Size, batch: int, fp8: bool) -> float:
    """The step's products at the chip's own speed: the blocks' linear layers, modulations left out, and the
    attention.
    """
    p, rows = size.params, batch * tokens(size)
    weights = (p.depth + p.depth_single_blocks) * (4 + 2 * p.mlp_ratio) * p.hidden_size**2
    linear = 2 * rows * weights
    attention = 4 * rows * tokens(size) * p.hidden_size * (p.depth + p.depth_single_blocks)
    return (linear / (LINEAR_FP8 if fp8 else LINEAR) + attention / ATTENTION) / 1e9


class Bench:
    """The nets, all with the same weights, and the inputs of a step.

    Args:
        backend: of torch.compile.
        whole: compile all blocks as one too, which may take minutes.
    """

    def __init__(self, size: Size, device: torch.device, backend: str, whole: bool):
        self.size, self.device, self.backend, self.whole = size, device, backend, whole
        torch.manual_seed(0)
        self.weights = {n: x.to(device) for n, x in random_transformer(size.params, device).items()}

    def net(self, compiled: bool = False, fp8: bool = False, epilogues: bool = False) -> Flux:
        with torch.device("meta"):
            net = Flux(self.size.params)
        net.load_state_dict(self.weights, assign=True)
        net.eval().requires_grad_(False)
        if fp8:
            to_fp8([net.double_blocks, net.single_blocks])
        if compiled:
            self.compile((*net.double_blocks, *net.single_blocks))
        if epilogues:
            net.compile_blocks(self.device)
        return net

    def compile(self, blocks) -> None:
        # As `Flux.compile_blocks`, but for one shape, whatever else has been compiled in this process.
        torch._dynamo.config.recompile_limit = 64
        ops.prepare_compiling()
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, backend=self.backend)

    def peer(self, compiled: bool = False):
        peer = peer_transformer(self.net())
        if compiled:
            self.compile((*peer.transformer_blocks, *peer.single_transformer_blocks))
        return peer

    def given(self, batch: int = 1) -> dict[str, Tensor]:
        p, side, text = self.size.params, self.size.side, self.size.text
        draw = partial(torch.randn, device=self.device, dtype=torch.bfloat16)
        ones = torch.ones(batch, device=self.device, dtype=torch.bfloat16)
        ids = sampling.image_ids(batch, side, side, self.device)
        return {
            "img": draw(batch, ids.shape[1], p.in_channels),
            "img_ids": ids,
            "txt": draw(batch, text, p.context_in_dim),
            "txt_ids": torch.zeros(batch, text, 3, device=self.device),
            "timesteps": 0.5 * ones,
            "y": draw(1, p.vec_in_dim).expand(batch, -1),
            "guidance": 3.5 * ones,
        }

    def ours(
        self, net: Flux, given: dict, ahead: bool = False, intervention: Intervention = NOTHING
    ) -> Callable:
        """A step; `ahead`: with the modulations there already."""
        mods = None
        if ahead:
            mods = net.modulations(*(given[name][:1] for name in ("timesteps", "y", "guidance")))
        return lambda: net.observe(**given, intervention=intervention, mods=mods)[0]

    def theirs(self, net, given: dict) -> Callable:
        arguments = {
            "hidden_states": given["img"],
            "encoder_hidden_states": given["txt"],
            "pooled_projections": given["y"],
            "timestep": given["timesteps"],
            "guidance": given["guidance"].float(),
            "img_ids": given["img_ids"][0],
            "txt_ids": given["txt_ids"][0],
        }
        return lambda: net(**arguments, return_dict=False)[0]

    def graphed(self, step: Callable) -> Callable:
        """The step as one CUDA graph, replayed."""
        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        # It reads what the step holds, wherever that lay.
        return lambda: (graph.replay(), result, step)[1]

    def ways(self) -> dict[str, tuple[Callable[[], Callable], int, bool]]:
        """By name: what makes a step ready, the images in it, and whether it is in 8 bits."""
        one, four, on_gpu = self.given(), self.given(BATCH), self.device.type == "cuda"
        eager, compiled = self.net(), self.net(compiled=True)
        layers = frozenset(self.size.layers)
        kept = eager.observe(**one, intervention=Intervention(keep=layers))[1].kept
        keeping, taking = Intervention(keep=layers), Intervention(take=kept)

        def whole() -> Callable:
            # All blocks in one graph of the compiler, and one of CUDA.
            step = self.ours(self.net(), one, ahead=True)
            return torch.compile(step, mode="reduce-overhead", fullgraph=True)

        ways = {
            "ours eager": (lambda: self.ours(eager, one), 1, False),
            "ours eager, modulations ahead": (lambda: self.ours(eager, one, True), 1, False),
            "diffusers eager": (lambda: self.theirs(self.peer(), one), 1, False),
            "ours compiled": (lambda: self.ours(compiled, one), 1, False),
            "ours compiled, modulations ahead": (lambda: self.ours(compiled, one, True), 1, False),
            "diffusers compiled": (lambda: self.theirs(self.peer(True), one), 1, False),
            "reference, kept": (lambda: self.ours(compiled, one, True, keeping), 1, False),
            "edit of a kept reference": (lambda: self.ours(compiled, one, True, taking), 1, False),
        }
        if on_gpu:
            ways |= {
                "ours compiled, CUDA graph": (
                    lambda: self.graphed(self.ours(compiled, one, True)), 1, False
                ),
            }  # fmt: skip
            if self.whole:
                ways["ours whole, reduce-overhead"] = (whole, 1, False)
        fp8 = self.net(compiled=True, fp8=True)
        ways |= {
            "fp8 eager": (lambda: self.ours(self.net(fp8=True), one, True), 1, True),
            "fp8 compiled": (lambda: self.ours(fp8, one, True), 1, True),
            "fp8 edit of a kept reference": (lambda: self.ours(fp8, one, True, taking), 1, True),
        }
        if on_gpu:
            ways["fp8 compiled, CUDA graph"] = (lambda: self.graphed(self.ours(fp8, one, True)), 1, True)
        if with_epilogues(self.device):
            joined, fp8_joined = (self.net(epilogues=True, fp8=fp8) for fp8 in (False, True))
            ways |= {
                "epilogues, modulations in the step": (lambda: self.ours(joined, one), 1, False),
                "epilogues": (lambda: self.ours(joined, one, True), 1, False),
                "epilogues, reference, kept": (lambda: self.ours(joined, one, True, keeping), 1, False),
                "epilogues, edit of it": (lambda: self.ours(joined, one, True, taking), 1, False),
                "epilogues, fp8": (lambda: self.ours(fp8_joined, one, True), 1, True),
                "epilogues, fp8, edit of it": (lambda: self.ours(fp8_joined, one, True, taking), 1, True),
                f"epilogues, batch {BATCH}": (lambda: self.ours(joined, four, True), BATCH, False),
            }
        return ways | {
            f"ours compiled, batch {BATCH}": (lambda: self.ours(compiled, four, True), BATCH, False),
            f"diffusers compiled, batch {BATCH}": (lambda: self.theirs(self.peer(True), four), BATCH, False),
        }

    def parts(self) -> dict[str, Callable]:
        """Pieces of a step by themselves: attention by its kernels, and the single blocks' second projection
        with one product of joined inputs or two that add up.
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
        epilogues = with_epilogues(self.device)
        if epilogues:
            parts["attention, flash-attn-4"] = partial(epilogues.Joined.attend, q, k, v)
        linear, width = self.net().single_blocks[0].linear2, p.hidden_size
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
    """What the step takes beside what is there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def prepared(make: Callable[[], Callable]) -> tuple[Callable | None, dict]:
    """The step, warm, and how long that took; or None and why not."""
    begin = time.perf_counter()
    try:
        step = make()
        for _ in range(3):
            step()
    except Exception as error:  # the others' numbers are worth having
        return None, {"error": f"{type(error).__name__}: {error}"[:1000]}
    return step, {"warm_up_s": time.perf_counter() - begin}


@exit_on_input_error()
@torch.no_grad()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    backend: str = "inductor",
    only: str | tuple[str, ...] = "",
    whole: bool = False,
) -> None:
    size, where = toy_size() if toy else full_size(), pick_device(device)
    check_device(where, torch.bfloat16)
    bench = Bench(size, where, backend, whole)
    words = only.split(",") if isinstance(only, str) else only
    chosen = {name: way for name, way in bench.ways().items() if any(word in name for word in words)}
    results = {"machine": machine(where), "side": size.side, "steps": {}, "parts": {}}
    ready: dict[str, Callable] = {}
    found = results["steps"]
    for name, (make, batch, in_8bit) in chosen.items():
        step, found[name] = prepared(make)
        found[name]["floor_ms"] = floor_ms(size, batch, in_8bit)
        if step:
            ready[name] = step
            found[name] |= {"peak_gib": peak_gib(step, where), "ms": []}
            # A CUDA graph's result lies where its next replay writes.
            found[name]["answer"] = step().float().cpu()
        print(name, {key: value for key, value in found[name].items() if key != "answer"}, flush=True)
    parts = {name: prepared(lambda make=make: make)[0] for name, make in bench.parts().items()}
    times = {name: [] for name, part in parts.items() if part}
    for _ in range(size.rounds):
        for name, step in ready.items():
            step()  # so that no way pays for the one before it
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
    fire.Fire(main)
