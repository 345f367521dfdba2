"""Measures an edit's step against the number of tokens that it may change, at FLUX.1-dev's full size.

    python -m benchmarks.sparse_edit [--output benchmarks/results/sparse_edit.json] [--only WORDS] [--toy]

A kept reference's keys and values of all layers lie on the device. The same step is taken whole, and with
2048, 1024 and 512 of 4096 image tokens free. Beside it stand diffusers' step, the reference's own, and a
reference with three edits. All variants share one set of random weights and are interleaved; medians in
milliseconds. Needs a GPU with 60 GB and no network, and takes about six minutes. `--only fp8,diffusers`
measures the variants whose names contain one of the words. `--toy` runs the same on a tiny model, anywhere.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    check_full_size,
    full_step,
    machine,
    markdown,
    milliseconds,
    relative_error,
)
from benchmarks.diffusers_models import diffusers_step
from benchmarks.step_speed import Bench, peak_gib, prepared, toy_step
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.intervention import FreeTokens, Intervention
from flux.math import Parts
from flux.model import Flux, Inputs, hopper_kernels
from flux.runtime.devices import pick_device
from flux.runtime.graphs import GraphedModel
from flux.runtime.quantize import check_fp8_support
from flux.settings.command_line import run

EDITS = 3
WAYS = {
    "eager": {},
    "compiled": {"compiled": True},
    "epilogues": {"epilogues": True},
    "fp8 compiled": {"fp8": True, "compiled": True},
    "fp8 epilogues": {"fp8": True, "epilogues": True},
}
Kept = dict[int, Parts]


class SparseBench(Bench):
    """Builds the variants. Blocks that torch compiles take sizes of masks as variables, as in sampling."""

    def compile(self, blocks) -> None:
        """Compile blocks as `Flux.compile_blocks` does on GPUs that are not Hopper's."""
        torch._dynamo.config.recompile_limit = 64
        for block in blocks:
            block.compile(fullgraph=True, backend=self.backend)

    def free(self, kept: Kept, count: int, place: int = 0) -> FreeTokens:
        """Free a rectangle of so many tokens, half as wide as the image, at one of its places."""
        side = self.size.side // 16
        mask = torch.zeros(side, side, dtype=torch.bool)
        width = side // 2
        rows = count // width
        top = min(place * rows // 2, side - rows)
        mask[top : top + rows, :width] = True
        return replace(FreeTokens.of(mask.flatten().to(self.device)), kv=kept)

    def all_steps(self, model: Flux) -> dict[str, Callable[[], Tensor]]:
        """Name the steps of one model, and those that a run records as CUDA graphs."""
        one = self.inputs()
        kept = model.observe(one, Intervention(keep=frozenset(range(model.num_layers))))[1].kept
        steps = self.steps(model, kept)
        if self.device.type == "cuda":
            recorded = self.steps(GraphedModel(model), kept)
            steps |= {f"{name}, recorded": recorded[name] for name in steps if "tokens" in name}
        return steps

    def steps(self, model: Flux | GraphedModel, kept: Kept) -> dict[str, Callable[[], Tensor]]:
        """Name the steps of one model, beside what a reference kept of all layers."""
        one, three = self.inputs(), self.inputs(EDITS)
        guidance = None if one.guidance is None else one.guidance[:1]
        mods = model.modulations(one.timesteps[:1], one.y[:1], guidance)
        every, vital = frozenset(kept), frozenset(self.size.layers)

        def ask(inputs: Inputs, what: Intervention) -> tuple[Tensor, Kept]:
            velocity, found = model.observe(inputs, what, mods=mods)
            return velocity, found.kept

        injected = {layer: kept[layer] for layer in vital}
        tokens = one.img.shape[1]

        def sparse(count: int, inject: bool = False) -> Callable[[], Tensor]:
            free = self.free(kept, count)
            return lambda: ask(one, Intervention(inject=injected if inject else {}, free=free))[0]

        def edits_whole() -> Tensor:
            own = ask(one, Intervention(keep=vital))[1]
            return ask(three, Intervention(inject=own))[0]

        rows = [replace(one, txt=three.txt[row : row + 1]) for row in range(EDITS)]
        masks = [self.free({}, tokens // 4, place) for place in range(EDITS)]

        def edits_sparse() -> Tensor:
            own = ask(one, Intervention(keep=every))[1]
            frees = [replace(mask, kv=own) for mask in masks]
            return torch.cat([ask(row, Intervention(free=free))[0] for row, free in zip(rows, frees)])

        return {
            "an edit, whole": lambda: ask(one, Intervention(inject=injected))[0],
            **{f"an edit, {tokens // part} tokens": sparse(tokens // part) for part in (2, 4, 8)},
            f"an edit, {tokens // 4} tokens, injecting": sparse(tokens // 4, inject=True),
            "a reference, all layers kept": lambda: ask(one, Intervention(keep=every))[0],
            f"a reference and {EDITS} edits, whole": edits_whole,
            f"a reference and {EDITS} edits, {tokens // 4} tokens each": edits_sparse,
        }


def check(model: Flux, inputs: Inputs, bench: SparseBench) -> float:
    """Compare a sparse step's free tokens with those of a whole step that holds all others."""
    kept = model.observe(inputs, Intervention(keep=frozenset(range(model.num_layers))))[1].kept
    other = bench.inputs(2)
    edit = replace(inputs, txt=other.txt[1:])
    free = bench.free(kept, inputs.img.shape[1] // 4)
    outside = torch.ones(1, inputs.img.shape[1], device=inputs.img.device)
    outside[:, free.computed] = 0
    held = Intervention(inject=kept, inject_weights=dict.fromkeys(kept, outside))
    sparse, whole = (model.observe(edit, way)[0] for way in (Intervention(free=free), held))
    return relative_error(sparse[:, free.computed].float(), whole[:, free.computed].float())


def table(found: dict[str, dict]) -> str:
    """Format the results: a row for each step, a column for each way."""
    peer = found.get("diffusers compiled", {}).get("median_ms")
    names = list(dict.fromkeys(name.split(": ", 1)[1] for name in found if ": " in name))
    ways = list(dict.fromkeys(name.split(": ", 1)[0] for name in found if ": " in name))
    rows = []
    for name in names:
        cells = [found.get(f"{way}: {name}", {}).get("median_ms") for way in ways]
        rows.append([name, *(f"{cell:.1f}" if cell else "-" for cell in cells)])
    title = "ms a step" + (f" (diffusers compiled, a whole image: {peer:.1f})" if peer else "")
    return markdown([title, *ways], rows)


@exit_on_input_error()
@torch.no_grad()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    backend: str = "inductor",
    only: str = "",
) -> None:
    """Run the benchmark.

    Args:
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        backend: backend of torch.compile
        only: measure only variants whose names contain one of these texts, with commas between them
    """
    size, where = toy_step() if toy else full_step(), pick_device(device)
    check_full_size(where, toy)
    check_fp8_support(where, torch.bfloat16)
    bench = SparseBench(size, where, backend)
    words = only.split(",")
    results: dict[str, Any] = {"machine": machine(where), "side": size.side}
    results["sparse to whole, held"] = check(bench.build(), bench.inputs(), bench)
    print(
        "relative difference of a sparse step to a whole one with all else held:",
        results["sparse to whole, held"],
    )
    found = results["steps"] = {}
    ready: dict[str, Callable] = {}

    def prepare(name: str, make: Callable[[], Callable]) -> None:
        step, found[name] = prepared(make)
        if step:
            ready[name] = step
            found[name] |= {"peak_gib": peak_gib(step, where), "ms": [milliseconds(step, where)]}
        if output:
            write_json(output, results)
        print(name, found[name], flush=True)

    if any(word in "diffusers compiled" for word in words):
        peer = bench.build_diffusers(compiled=True)
        prepare("diffusers compiled", lambda: diffusers_step(peer, bench.inputs()))
    for way, how in WAYS.items():
        if not any(word in way for word in words) or ("epilogues" in way and not hopper_kernels(where)):
            continue
        for name, step in bench.all_steps(bench.build(**how)).items():
            prepare(f"{way}: {name}", lambda step=step: step)
    for _ in range(size.rounds):
        for name, step in ready.items():
            step()  # so that no variant pays for the one before it
            found[name]["ms"].append(milliseconds(step, where))
    for name in ready:
        found[name]["median_ms"] = statistics.median(found[name]["ms"])
    if output:
        write_json(output, results)
    print("\n" + table(found))


if __name__ == "__main__":
    run(main, __doc__)
