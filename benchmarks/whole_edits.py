"""Measures a reference and three local edits of FLUX.1-dev, from the text to the pixels, with random weights.

    python -m benchmarks.whole_edits [--gpus 4] [--output output/benchmarks/whole_edits.json]

28 steps of 1024x1024. Each edit may change a quarter of the image, by a mask of its own. Sparse steps, as by
default, are measured as CUDA graphs and launched one by one; beside them stand whole steps. Everything else
is as in `benchmarks.whole_images`. Takes about three minutes. `--toy --device cpu` runs the same on tiny
models.
"""

from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks.common import EDITS, GUIDANCE, PROMPT, machine, markdown, toy_plan
from benchmarks.whole_images import SIDE, STEPS, join_processes, pipelines, time_rounds, warm_up
from flux.editing.edit import edit
from flux.errors import exit_on_input_error, only_rank_zero_prints
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import Edit, EditSettings
from flux.settings.resolved import ResolvedEdit
from flux.specs import VITAL_LAYERS_DEV, configs


def settings_of(folder: str, side: int, steps: int, sparse: bool) -> ResolvedEdit:
    """Settle the edits, and write their masks into the folder."""
    edits = []
    for place, prompt in enumerate(EDITS):
        mask = Image.new("L", (side, side))
        corner = side // 4 * place
        mask.paste(255, (corner, corner, corner + side // 2, corner + side // 2))
        mask.save(path := f"{folder}/{place}.png")
        edits.append(Edit(prompt=prompt, mask=path))
    settings = EditSettings(
        model="flux-dev", prompt=PROMPT, edits=tuple(edits), width=side, height=side, num_steps=steps,
        guidance=GUIDANCE, batch_size=len(edits), sparse=sparse, watermark=False,
    )  # fmt: skip
    return resolve(settings)


def all_runs(
    pipes: dict[str, LoadedModel], layers: tuple[int, ...], folder: str, side: int, steps: int
) -> dict[str, Callable[[], object]]:
    """Name the runs: each pipeline's, and the first one's with whole steps."""
    sparse, whole = (settings_of(folder, side, steps, each) for each in (True, False))
    first = next(iter(pipes))
    work = {name: (pipe, sparse) for name, pipe in pipes.items()} | {f"{first}, whole": (pipes[first], whole)}
    return {name: lambda each=each: edit(*each, layers, progress=False) for name, each in work.items()}


@exit_on_input_error()
@only_rank_zero_prints()
def main(
    gpus: int = 1,
    output: str | None = None,
    rounds: int = 5,
    toy: bool = False,
    device: str = "auto",
    compiled: bool = True,
) -> None:
    """Run the benchmark.

    Args:
        gpus: number of GPUs that share each run
        output: JSON file to write to; if not set, one in output/benchmarks
        rounds: how often each run is timed after the first time
        toy: measure tiny models, on any machine
        device: where to run: "auto", "cpu", "cuda"
        compiled: compile the blocks of the transformers
    """
    group, where = join_processes("benchmarks.whole_edits", gpus, device)
    spec, steps, side = (toy_plan().spec, 2, 64) if toy else (configs["flux-dev"], STEPS, SIDE)
    pipes = pipelines(replace(spec, clip_length=77), where, group, toy, compiled)
    results: dict[str, Any] = {"machine": machine(where), "gpus": gpus, "steps": steps, "side": side}

    def save() -> None:
        if group.rank == 0:
            write_json(output or f"output/benchmarks/whole_edits_{gpus}.json", results)

    with TemporaryDirectory() as folder:
        runs = all_runs(pipes, (0, 1) if toy else VITAL_LAYERS_DEV, folder, side, steps)
        found = results["runs"] = warm_up(runs, where)
        time_rounds(runs, found, rounds, where, save)
    header = [f"a reference and {len(EDITS)} edits, {gpus} GPU{'s' * (gpus > 1)}", "s, whole run"]
    print(markdown(header, [[name, f"{entry['median_s']:.3f}"] for name, entry in found.items()]))


if __name__ == "__main__":
    run(main, __doc__)
