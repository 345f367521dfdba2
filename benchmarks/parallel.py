"""Measures a step of FLUX.1-dev at full size, with random weights, on one GPU and shared among several.

    python -m benchmarks.parallel [--gpus 2] [--output output/benchmarks/parallel_2.json]

Starts itself through torchrun, on all CUDA GPUs unless told how many. Measures an image of 1024x1024, and a
reference with three edits that inject its keys and values as one batch; eager, and compiled unless
`--compiled=False`, where passes of few tokens are CUDA graphs as in a run. Whole steps, which every GPU
computes alone, and shared ones are interleaved; medians. Each GPU needs 40 GB. Takes about three minutes.
`--toy --device cpu --gpus 2` runs the same on a tiny model.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import (
    GIB,
    StepSize,
    full_step,
    machine,
    markdown,
    milliseconds,
    random_inputs,
    relative_error,
    start_processes,
)
from benchmarks.random_weights import random_transformer
from flux.errors import InputError, exit_on_input_error, launched, only_rank_zero_prints
from flux.files import write_json
from flux.intervention import Intervention
from flux.model import Flux
from flux.runtime.graphs import GraphedModel
from flux.runtime.parallel import SequenceParallelFlux, join
from flux.settings.command_line import run
from flux.specs import configs

EDITS = 3
RESULTS = Path("output/benchmarks")


def toy_step() -> StepSize:
    """Return the step of a tiny model."""
    small = {"hidden_size": 64, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6]}
    return StepSize(replace(configs["flux-dev"].params, **small), 80, 8, (0, 1), rounds=2)


def steps(
    size: StepSize, model: Flux | SequenceParallelFlux, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Make the steps to measure, with modulations computed in advance as in sampling."""
    one, three = random_inputs(size, 1, device), random_inputs(size, EDITS, device)
    mods = model.modulations(one.timesteps, one.y, one.guidance)
    keeping = Intervention(keep=frozenset(size.layers))

    def image() -> Tensor:
        return model.observe(one, mods=mods)[0]

    def edits() -> Tensor:
        found = model.observe(one, intervention=keeping, mods=mods)[1]
        return model.observe(three, intervention=Intervention(inject=found.kept), mods=mods)[0]

    return {"an image": image, f"a reference and {EDITS} edits": edits}


def timed(step: Callable[[], Tensor], device: torch.device) -> float:
    """Time a step in milliseconds, after another one, so that all processes begin it together."""
    step()
    return milliseconds(step, device)


def warmed(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, dict]:
    """Warm a step up. Return its result, the time that took, and the largest peak of all GPUs."""
    begin = time.perf_counter()
    for _ in range(2):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    answer = step().float().cpu()
    found = {"warm_up_s": time.perf_counter() - begin}
    if device.type == "cuda":
        peak = torch.tensor(torch.cuda.max_memory_allocated() / GIB, device=device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found["peak_gib"] = peak.item()
    return answer, found


def measure(
    size: StepSize, models: tuple[Flux, SequenceParallelFlux], device: torch.device
) -> dict[str, dict]:
    """Measure each step computed by one GPU and by all, interleaved."""
    results = {}
    whole, shared = (steps(size, model, device) for model in models)
    for name in whole:
        ways = {"one GPU": whole[name], "shared": shared[name]}
        answers, found = {}, {}
        for way, step in ways.items():
            answers[way], found[way] = warmed(step, device)
        times = {way: [] for way in ways}
        for _ in range(size.rounds):
            for way, step in ways.items():
                times[way].append(timed(step, device))
        for way, each in times.items():
            found[way]["ms"] = statistics.median(each)
        difference = relative_error(answers["shared"], answers["one GPU"])
        speedup = found["one GPU"]["ms"] / found["shared"]["ms"]
        results[name] = {**found, "speedup": speedup, "difference": difference}
    return results


def table(results: dict[str, dict[str, dict]], count: int) -> str:
    """Format the results."""
    rows = []
    for mode, of_mode in results.items():
        for name, found in of_mode.items():
            ways = found["one GPU"], found["shared"]
            peaks = [f"{way['peak_gib']:.1f}" if "peak_gib" in way else "-" for way in ways]
            numbers = [f"{way['ms']:.1f}" for way in ways]
            rows.append([f"{name}, {mode}", *numbers, f"{found['speedup']:.2f}", *peaks])
    header = [
        "ms a step",
        "one GPU",
        f"{count} GPUs",
        "times as fast",
        "GiB on one",
        f"GiB on each of {count}",
    ]
    return markdown(header, rows)


@exit_on_input_error()
@only_rank_zero_prints()
@torch.no_grad()
def main(
    gpus: int | None = None,
    output: str | None = None,
    compiled: bool = True,
    toy: bool = False,
    device: str = "auto",
) -> None:
    """Run the benchmark.

    Args:
        gpus: number of GPUs; if not set, all of them
        output: JSON file to write to; if not set, one in output/benchmarks
        compiled: measure compiled models too
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda"
    """
    count = int(os.environ["WORLD_SIZE"]) if launched() else gpus or torch.cuda.device_count()
    if count < 2:
        raise InputError(f"Got {count} GPUs, expected 2 or more that share a step: give their number as gpus")
    if not launched():
        start_processes("benchmarks.parallel", count)
    size, ranks = toy_step() if toy else full_step(), join(count, device)
    where = ranks.device
    assert where is not None  # each process that has joined has one
    torch.manual_seed(0)
    weights = {n: x.to(where) for n, x in random_transformer(size.params, where).items()}

    def build(compiled: bool) -> Flux:
        with torch.device("meta"):
            model = Flux(size.params)
        model.load_state_dict(weights, assign=True)
        if compiled:
            model.compile_blocks(where)
        return model.eval()

    path = output or RESULTS / f"parallel_{count}.json"
    results: dict[str, Any] = {
        "machine": machine(where),
        "gpus": count,
        "side": size.side,
        "steps": {},
    }
    for mode in ("eager", "compiled")[: 1 + compiled]:
        one, shared = (build(mode == "compiled") for _ in range(2))
        graphed = GraphedModel(shared) if mode == "compiled" and where.type == "cuda" else None
        models = one, SequenceParallelFlux(shared, ranks, graphed)
        results["steps"][mode] = measure(size, models, where)
        if ranks.rank == 0:
            write_json(path, results)
            print(f"{mode}: {results['steps'][mode]}", flush=True)
    print(f"\n{table(results['steps'], count)}")


if __name__ == "__main__":
    run(main, __doc__)
