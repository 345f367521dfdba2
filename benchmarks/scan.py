"""Measures a scan at full size, with random weights.

It compares an image with a skipped layer with a plain one, and projects the whole protocol from it (64
prompts, every layer, 15 steps). It also measures how long the denoiser waits in a short scan, and how the
work scales with GPUs.

    python -m benchmarks.scan --folder /tmp/random-flux [--workers 1,2]
        [--output benchmarks/results/GPU-scan.json]

Writes 24 GB to the folder once. Each number of workers above needs that many GPUs and `ray`. `--toy` runs the
same on flux-nano's own weights, on any machine.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import check_full_size, machine
from benchmarks.random_weights import write_dinov2, write_random_model
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.runtime.devices import pick_device
from flux.sampling import VelocityModel
from flux.scan.layers import REFERENCE
from flux.scan.run import scan
from flux.scan.skipper import LayerSkipper, SkipTask
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.demos import ScanSettings
from flux.settings.fields import Numbers
from flux.settings.resolved import ResolvedScan
from flux.specs import configs

PROMPT = "a photo of a dog on the grass"
OTHER_PROMPT = "a dog on a photo"  # the tokenizers know only these words
PROMPTS = 64
TASKS_EACH = 14  # for each worker, after its first


def settings_for(toy: bool, folder: Path, device: torch.device, compiled: bool) -> ResolvedScan:
    """Make the protocol's settings, for random weights of flux-dev or, as a toy, for flux-nano."""
    fields: dict[str, Any] = {
        "prompts": ({"prompt": PROMPT, "seed": 0},),
        "watermark": False,
        "compile": compiled,
        "top": 1,
    }
    if toy:
        return resolve(ScanSettings(**fields, width=64, height=64, num_steps=2))
    files = write_random_model(folder, configs["flux-dev"], set(PROMPT.split()), device)
    fields |= {"weights": str(files.flow), "ae_weights": str(files.ae), "text_encoders": str(files.text)}
    fields["encoder"] = str(write_dinov2(folder / "dinov2", device))
    return resolve(ScanSettings(**fields, model="flux-dev", num_steps=15, guidance=3.5))


def seconds(skipper: LayerSkipper, layers: tuple[int, ...], repeats: int = 1) -> float:
    """Measure the median time of one image with `layers` skipped."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        skipper.make(SkipTask(0, PROMPT, 0, (layers,)))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def waiting(pipe: LoadedModel, settings: ResolvedScan, layers: list[int]) -> dict:
    """Measure a scan of two prompts: the time from its first step to its last, and the share without a step.

    In that share, images are decoded, written and scored, or the next prompt is encoded.
    """
    denoising, worked = pipe.denoising, []

    @contextmanager
    def watched() -> Iterator[VelocityModel]:
        begin = time.perf_counter()
        with denoising() as model:
            yield model
        worked.append((begin, time.perf_counter()))

    prompts = tuple({"prompt": prompt, "seed": 0} for prompt in (PROMPT, OTHER_PROMPT))
    with TemporaryDirectory() as folder:
        fields = {**settings.to_json(), "prompts": prompts, "layers": layers, "output_dir": folder}
        pipe.denoising = watched
        scan(resolve(ScanSettings(**fields)), progress=False, pipe=pipe)
        del pipe.denoising
    wall = worked[-1][1] - worked[0][0]
    return {"scan_s": wall, "waiting": 1 - sum(end - begin for begin, end in worked) / wall}


def one_process(settings: ResolvedScan) -> dict:
    """Measure plain images and images with a skipped layer, project a whole scan, and add `waiting`."""
    begin = time.perf_counter()
    pipe = LoadedModel.load(settings)
    skipper = LayerSkipper(settings, pipe)
    load = time.perf_counter() - begin
    for layers in (REFERENCE, (0,)):
        seconds(skipper, layers)
    num_layers = configs[settings.model].num_layers
    plain = seconds(skipper, REFERENCE, repeats=3)
    chosen = [round(i * (num_layers - 1) / 6) for i in range(7)]
    skipped = {layer: seconds(skipper, (layer,)) for layer in chosen}
    mean = statistics.mean(skipped.values())
    return {
        "load_s": load,
        "plain_s": plain,
        "skipped_s": skipped,
        "skipped_to_plain": mean / plain,
        "whole_scan_min": PROMPTS * (plain + num_layers * mean) / 60,
        **waiting(pipe, settings, chosen),
    }


def shared(settings: ResolvedScan, workers: int) -> dict:
    """Measure images a second of so many workers, after each has delivered its first one."""
    from flux.runs.workers import finish_beside, gpus_per_worker, run_tasks

    num_layers = configs[settings.model].num_layers
    count = workers * (1 + TASKS_EACH)
    # One prompt and the same few layers for every worker, so that all numbers of workers do equal work.
    tasks = [SkipTask(0, PROMPT, 0, ((i // workers * 4 % num_layers,),)) for i in range(count)]
    begin = time.perf_counter()
    gpus = gpus_per_worker(settings.device)
    results = run_tasks(LayerSkipper, (settings,), tasks, workers, None, gpus)
    times = [time.perf_counter() for _ in finish_beside(results, lambda _, decode: decode())]
    measured = times[-1] - times[workers - 1]
    return {"start_s": times[0] - begin, "images_per_s": (count - workers) / measured}


@exit_on_input_error()
def main(
    folder: str = "/tmp/random-flux",
    workers: Numbers = (),
    compiled: bool = False,
    toy: bool = False,
    output: str | None = None,
) -> None:
    """Run the benchmark.

    Args:
        folder: folder of the random weights, written if they are not there
        workers: numbers of workers to measure
        compiled: compile the transformer's blocks
        toy: measure flux-nano, on any machine
        output: JSON file to write to
    """
    device = pick_device("auto")
    check_full_size(device, toy)
    settings = settings_for(toy, Path(folder), device, compiled)
    result = {
        "machine": machine(device),
        "settings": settings.to_json(),
        "one_process": one_process(settings),
    }
    print(result["one_process"], flush=True)
    print(f"the denoiser waits {result['one_process']['waiting']:.1%} of a scan's time", flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for count in workers:
        result[f"workers_{count}"] = shared(settings, count)
        print(count, result[f"workers_{count}"], flush=True)
    speeds = {count: result[f"workers_{count}"]["images_per_s"] for count in workers}
    if 1 in speeds:
        result["efficiency"] = {n: speed / (n * speeds[1]) for n, speed in speeds.items()}
        print("efficiency", result["efficiency"], flush=True)
    if output:
        write_json(Path(output), result)


if __name__ == "__main__":
    run(main, __doc__)
