"""What a scan costs at full size, with random weights: a bypassed picture beside a plain one, the whole
protocol (64 prompts, every layer, 15 steps) projected from it, and how the work spreads over GPUs.

    python -m benchmarks.scan --folder /tmp/random-flux [--workers 1,2] [--output
    benchmarks/results/CARD-scan.json]

Writes 24 GB to the folder once. Each number of workers above needs that many GPUs and `ray`. `--toy` runs the
same on flux-nano's own weights, on any machine.
"""

import statistics
import time
from pathlib import Path

import fire
import torch

from benchmarks.report import machine
from benchmarks.stand_ins import write_stand_ins
from flux.errors import exit_on_input_error
from flux.images import write_json
from flux.pipeline import Pipeline, pick_device
from flux.settings import SkipSettings
from flux.specs import complete, configs
from flux.vitality import REFERENCE, Bypasser, SweepWorker, Task

PROMPT = "a photo of a dog on the grass"
PROMPTS = 64
TASKS_EACH = 14  # for each worker, after its first


def settings_for(toy: bool, folder: Path, device: torch.device, compiled: bool) -> SkipSettings:
    """The protocol's settings, on stand-ins for flux-dev or, as a toy, on flux-nano."""
    common = {"prompts": ({"prompt": PROMPT, "seed": 0},), "watermark": False, "compile": compiled}
    if toy:
        return complete(SkipSettings(**common, width=64, height=64, num_steps=2))
    files = write_stand_ins(folder, configs["flux-dev"], set(PROMPT.split()), device)
    paths = {"weights": files.flow, "ae_weights": files.ae, "text_encoders": files.text}
    paths = {name: str(path) for name, path in paths.items()}
    return complete(SkipSettings(model="flux-dev", **common, **paths, num_steps=15, guidance=3.5))


def seconds(bypasser: Bypasser, layers: tuple[int, ...], repeats: int = 1) -> float:
    """Median time of one picture with `layers` bypassed."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        bypasser.make(Task(0, PROMPT, 0, (layers,)))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def one_process(settings: SkipSettings) -> dict:
    """Times of plain and bypassed pictures, and the whole scan's projected from them."""
    begin = time.perf_counter()
    bypasser = Bypasser(Pipeline.load(settings), settings)
    load = time.perf_counter() - begin
    for layers in (REFERENCE, (0,)):
        seconds(bypasser, layers)
    num_layers = configs[settings.model].num_layers
    plain = seconds(bypasser, REFERENCE, repeats=3)
    chosen = [round(i * (num_layers - 1) / 6) for i in range(7)]
    bypassed = {layer: seconds(bypasser, (layer,)) for layer in chosen}
    mean = statistics.mean(bypassed.values())
    return {
        "load_s": load,
        "plain_s": plain,
        "bypassed_s": bypassed,
        "bypassed_to_plain": mean / plain,
        "whole_scan_min": PROMPTS * (plain + num_layers * mean) / 60,
    }


def shared(settings: SkipSettings, workers: int) -> dict:
    """Pictures a second of so many workers, from the moment when each has delivered its first."""
    from flux.cluster import gpus_per_worker, run_tasks

    num_layers = configs[settings.model].num_layers
    count = workers * (1 + TASKS_EACH)
    # Of one prompt and the same few layers for every worker, so that all numbers of workers do equal work.
    tasks = [Task(0, PROMPT, 0, ((i // workers * 4 % num_layers,),)) for i in range(count)]
    begin, times = time.perf_counter(), []
    for _ in run_tasks(SweepWorker, (settings,), tasks, workers, None, gpus_per_worker(settings.device)):
        times.append(time.perf_counter())
    measured = times[-1] - times[workers - 1]
    return {"start_s": times[0] - begin, "pictures_per_s": (count - workers) / measured}


@exit_on_input_error()
def main(
    folder: str = "/tmp/random-flux",
    workers: tuple[int, ...] = (),
    compiled: bool = False,
    toy: bool = False,
    output: str | None = None,
) -> None:
    device = pick_device("auto")
    settings = settings_for(toy, Path(folder), device, compiled)
    result = {
        "machine": machine(device),
        "settings": settings.to_json(),
        "one_process": one_process(settings),
    }
    print(result["one_process"], flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    counts = [workers] if isinstance(workers, int) else list(workers)
    for count in counts:
        result[f"workers_{count}"] = shared(settings, count)
        print(count, result[f"workers_{count}"], flush=True)
    speeds = {count: result[f"workers_{count}"]["pictures_per_s"] for count in counts}
    if 1 in speeds:
        result["efficiency"] = {n: speed / (n * speeds[1]) for n, speed in speeds.items()}
        print("efficiency", result["efficiency"], flush=True)
    if output:
        write_json(Path(output), result)


if __name__ == "__main__":
    fire.Fire(main)
