"""A step of FLUX.1-dev at full size, with random weights, on one card and shared out over several.

    python -m benchmarks.parallel [--cards 2] [--output benchmarks/results/parallel_2.json]

Starts itself through torchrun, on all CUDA cards that are there unless told how many. A picture of 1024x1024,
and a reference with three edits that take over its keys and values as one batch; eager, and compiled unless
`--compiled=False`. Whole steps, which every card takes alone, and shared ones take turns; medians. Each card
needs 40 GB; meant to be done in three minutes. `--toy --device cpu --cards 2` runs the same on a tiny model.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fire
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.random_weights import random_transformer
from benchmarks.report import GIB, machine, markdown, milliseconds
from flux import sampling
from flux.errors import InputError, exit_on_input_error, launched, one_voice
from flux.files import write_json
from flux.intervention import Intervention
from flux.model import Flux, FluxParams
from flux.runtime.parallel import Divided, join
from flux.settings.demos import Divisible
from flux.specs import configs

EDITS = 3
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    params: FluxParams
    side: int
    text: int
    layers: tuple[int, ...]
    rounds: int


def size_of(toy: bool) -> Size:
    dev = configs["flux-dev"]
    if not toy:
        return Size(dev.params, 1024, 512, dev.vital_layers, rounds=10)
    small = {"hidden_size": 64, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6]}
    return Size(replace(dev.params, **small), 80, 8, (0, 1), rounds=2)


def inputs(size: Size, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Arguments of `Flux.observe`, drawn on the CPU: the same in all processes."""
    p, generator = size.params, torch.Generator().manual_seed(batch)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    ones = torch.ones(batch, device=device, dtype=torch.bfloat16)
    ids = sampling.image_ids(batch, size.side, size.side, device)
    return {
        "img": draw(batch, ids.shape[1], p.in_channels),
        "img_ids": ids,
        "txt": draw(batch, size.text, p.context_in_dim),
        "txt_ids": torch.zeros(batch, size.text, 3, device=device),
        "timesteps": 0.5 * ones,
        "y": draw(1, p.vec_in_dim).expand(batch, -1),
        "guidance": 3.5 * ones,
    }


def steps(size: Size, net: Flux | Divided, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """What is measured: each a step as a sampling takes it, its modulations worked out ahead."""
    one, three = inputs(size, 1, device), inputs(size, EDITS, device)
    mods = net.modulations(*(one[name] for name in ("timesteps", "y", "guidance")))
    keeping = Intervention(keep=frozenset(size.layers))

    def picture() -> Tensor:
        return net.observe(**one, mods=mods)[0]

    def edits() -> Tensor:
        found = net.observe(**one, intervention=keeping, mods=mods)[1]
        return net.observe(**three, intervention=Intervention(take=found.kept), mods=mods)[0]

    return {"a picture": picture, f"a reference and {EDITS} edits": edits}


def timed(step: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds; the step before it is taken as well, so that all processes begin it together."""
    step()
    return milliseconds(step, device)


def warmed(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, dict]:
    """What the step answers; how long its first three took, and what any card then holds at its peak."""
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


def measure(size: Size, nets: tuple[Flux, Divided], device: torch.device) -> dict[str, dict]:
    """Both ways of each step, in turns."""
    results = {}
    whole, shared = (steps(size, net, device) for net in nets)
    for name in whole:
        ways = {"one card": whole[name], "shared": shared[name]}
        answers, found = {}, {}
        for way, step in ways.items():
            answers[way], found[way] = warmed(step, device)
        times = {way: [] for way in ways}
        for _ in range(size.rounds):
            for way, step in ways.items():
                times[way].append(timed(step, device))
        for way, each in times.items():
            found[way]["ms"] = statistics.median(each)
        difference = (answers["shared"] - answers["one card"]).norm() / answers["one card"].norm()
        speedup = found["one card"]["ms"] / found["shared"]["ms"]
        results[name] = {**found, "speedup": speedup, "difference": difference.item()}
    return results


def table(results: dict[str, dict[str, dict]], count: int) -> str:
    rows = []
    for mode, of_mode in results.items():
        for name, found in of_mode.items():
            ways = found["one card"], found["shared"]
            peaks = [f"{way['peak_gib']:.1f}" if "peak_gib" in way else "-" for way in ways]
            numbers = [f"{way['ms']:.1f}" for way in ways]
            rows.append([f"{name}, {mode}", *numbers, f"{found['speedup']:.2f}", *peaks])
    header = [
        "ms a step",
        "one card",
        f"{count} cards",
        "times as fast",
        "GiB on one",
        f"GiB on each of {count}",
    ]
    return markdown(header, rows)


def start(count: int) -> None:
    """This command again, by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [sys.executable, *torchrun, "-m", "benchmarks.parallel", *sys.argv[1:]]
    sys.exit(subprocess.run(command).returncode)


@exit_on_input_error()
@one_voice()
@torch.no_grad()
def main(
    cards: int | None = None,
    output: str | None = None,
    compiled: bool = True,
    toy: bool = False,
    device: str = "auto",
) -> None:
    count = int(os.environ["WORLD_SIZE"]) if launched() else cards or torch.cuda.device_count()
    if count < 2:
        raise InputError(
            f"Got {count} cards, expected 2 or more that share a step: give their number as cards"
        )
    if not launched():
        start(count)
    size, ranks = size_of(toy), join(Divisible(model="flux-dev", parallel=count, device=device))
    torch.manual_seed(0)
    weights = {n: x.to(ranks.device) for n, x in random_transformer(size.params, ranks.device).items()}

    def net(compiled: bool) -> Flux:
        with torch.device("meta"):
            made = Flux(size.params)
        made.load_state_dict(weights, assign=True)
        if compiled:
            made.compile_blocks(ranks.device)
        return made.eval()

    path = output or RESULTS / f"parallel_{count}.json"
    results = {"machine": machine(ranks.device), "cards": count, "side": size.side, "steps": {}}
    for mode in ("eager", "compiled")[: 1 + compiled]:
        nets = (net(mode == "compiled"), Divided(net(mode == "compiled"), ranks))
        results["steps"][mode] = measure(size, nets, ranks.device)
        if ranks.rank == 0:
            write_json(path, results)
            print(f"{mode}: {results['steps'][mode]}", flush=True)
    print(f"\n{table(results['steps'], count)}")


if __name__ == "__main__":
    fire.Fire(main)
