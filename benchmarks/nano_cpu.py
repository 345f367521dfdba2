"""Times flux-nano on the CPU: what a newcomer with a laptop waits for.

    python -m benchmarks.nano_cpu [--repeats 3] [--num_steps 20] [--size 256] [--model flux-nano-schnell]
        [--output FILE.json]

It takes medians of: the import of flux in a new interpreter, loading, an image, a reference with three edits.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.common import machine, markdown
from flux.editing.edit import edit
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings
from flux.settings.files import read_settings
from flux.settings.resolved import ResolvedEdit
from flux.vital_layers import find_vital_layers

IMPORT = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def import_seconds(module: str) -> float:
    """Time an import in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Time some work several times."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def measure(settings: ResolvedEdit, repeats: int) -> dict[str, list[float]]:
    """Time each thing so many times, in seconds."""
    modules = ("flux", "flux.loaded_model")
    times = {f"import {module}": [import_seconds(module) for _ in range(repeats)] for module in modules}
    # The first one also imports transformers, as every run of a demo does.
    loaded: list[LoadedModel] = []
    times["load"] = seconds(lambda: loaded.append(LoadedModel.load(settings)), repeats)
    pipe = loaded[-1]
    layers = find_vital_layers(settings.vital_layers, pipe.spec)
    same = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt")
    sampling = {name: getattr(settings, name) for name in same}
    prompts, seeds = [settings.prompt or ""], [settings.seed]
    times["an image"] = seconds(lambda: pipe.generate(prompts, seeds, **sampling, progress=False), repeats)
    times[f"a reference and {len(settings.edits)} edits"] = seconds(
        lambda: edit(pipe, settings, layers, progress=False), repeats
    )
    return times


@exit_on_input_error()
def main(
    repeats: int = 3,
    num_steps: int = 20,
    size: int = 256,
    output: str | None = None,
    model: str = "flux-nano",
) -> None:
    """Run the benchmark.

    Args:
        repeats: times that each thing is measured
        num_steps: denoising steps
        size: width and height of the images in pixels
        output: JSON file to write to; if not set, none is written
        model: the model, one of flux.specs.configs
    """
    wanted = {"model": model, "num_steps": num_steps, "width": size, "height": size, "device": "cpu"}
    settings = resolve(read_settings(EditSettings, "edit.json", wanted))
    times = measure(settings.model_copy(update={"edits": settings.edits[:3]}), repeats)
    about = machine(torch.device("cpu"))
    rows = [[name, f"{statistics.median(each):.2f}", f"{each[0]:.2f}"] for name, each in times.items()]
    print(f"{model}, {about['device']}, {about['threads']} threads, {size}x{size}, {num_steps} steps")
    print(markdown(["seconds", "median", "first"], rows))
    if output:
        found = {"machine": about, "model": model, "size": size, "num_steps": num_steps, "seconds": times}
        write_json(output, found)


if __name__ == "__main__":
    run(main, __doc__)
