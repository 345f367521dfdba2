"""Measures three edits of a photograph at full size, with random weights: time and memory.

Keys and values are kept on the device or in main memory. One more edit of a kept reference is measured too.

    python -m benchmarks.edit_photo --folder /tmp/random-flux [--output benchmarks/results/GPU-edit.json]

Uses, or writes once, the 24 GB that `benchmarks.full_size` works with. `--toy` runs the same on a tiny model,
on any machine; `--compiled=False` leaves out what takes minutes to compile.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.common import (
    EDITS,
    GIB,
    GUIDANCE,
    PROMPT,
    PassClock,
    check_full_size,
    full_plan,
    load_random,
    machine,
    markdown,
    peak_gib,
    toy_plan,
)
from flux.editing.edit import edit, edit_reference
from flux.editing.reference import keep_reference
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.runtime.devices import pick_device
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import Edit, EditSettings
from flux.settings.resolved import ResolvedEdit

T = TypeVar("T")
METHODS = ("euler", "midpoint", "fireflow")


def photograph(width: int, height: int) -> Image.Image:
    """Draw an image of another size and shape than the edits."""
    coarse = np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((3 * width // 2, height), Image.Resampling.BICUBIC)


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, dict[str, Any]]:
    """Return the result of `run`, its seconds, and on a GPU its peak memory."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = run()
    if on_gpu:
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - begin}
    return result, found | ({"peak_gib": peak_gib(device)} if on_gpu else {})


def measure(pipe: LoadedModel, settings: ResolvedEdit, layers: tuple[int, ...], photo: Image.Image) -> dict:
    """Measure seconds and memory of each piece of work, by its name."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, run: Callable[[], T]) -> T:
        with PassClock(pipe.model.final_layer, pipe.device) as clock:
            result, found[name] = timed(run, pipe.device)
        found[name]["pass_ms"] = clock.step_ms(1)["median"]
        return result

    at_once = settings.model_copy(update={"batch_size": len(EDITS)})
    for method in METHODS:
        inverted = at_once.model_copy(update={"inversion": method})
        note(
            f"{method}, inversion and 3 edits, nothing kept",
            lambda inverted=inverted: edit(pipe, inverted, layers, photo, progress=False),
        )
    for place, fits in (("device", True), ("main memory", False)):
        with patch("flux.editing.reference.fits_on_device", return_value=fits or pipe.device.type != "cuda"):
            name = f"inversion, kept in {place}"
            kept = note(name, lambda: keep_reference(pipe, settings, layers, photo, progress=False))
        found[name]["kept_gib"] = sum(step.num_bytes() for step in kept.steps) / GIB
        for number in (1, 3):
            edits = EDITS[:number]
            note(
                f"{number} edits of what is kept in {place}",
                lambda kept=kept, edits=edits: edit_reference(pipe, kept, edits, at_once, progress=False),
            )
        kept = None
    return found


@exit_on_input_error()
def main(
    folder: str,
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    num_steps: int = 12,
    compiled: bool = True,
) -> None:
    """Run the benchmark.

    Args:
        folder: folder of the random weights, written if they are not there
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        num_steps: denoising steps
        compiled: measure the compiled model too
    """
    plan, where = toy_plan() if toy else full_plan(), pick_device(device)
    check_full_size(where, toy)
    pipe, _ = load_random(plan, folder, where)
    size = plan.work[0]
    edits = tuple(Edit(prompt=prompt) for prompt in EDITS)
    settings = EditSettings(
        prompt=PROMPT, edits=edits, dose="paper", photo="photo", width=size.width, height=size.height,
        num_steps=num_steps, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
    )  # fmt: skip
    settings = resolve(settings)
    photo = photograph(size.width, size.height)
    results: dict[str, Any] = {"machine": machine(where), "model": plan.model, "num_steps": num_steps}
    for mode in ("eager", "compiled") if compiled else ("eager",):
        if mode == "compiled":
            pipe.model.compile_blocks()
        # Warms up, and compiles each kind of pass.
        measure(pipe, settings.model_copy(update={"num_steps": 2}), plan.layers, photo)
        results[mode] = measure(pipe, settings, plan.layers, photo)
        columns = ("seconds", "pass_ms", "peak_gib", "kept_gib")
        rows = [
            [name, *(f"{found[key]:.1f}" if key in found else "-" for key in columns)]
            for name, found in results[mode].items()
        ]
        print(f"\n{mode}, {size.width}x{size.height}, {num_steps} steps")
        print(markdown(["work", "s", "ms a pass", "GiB at the peak", "GiB kept"], rows), flush=True)
        if output:
            write_json(output, results)


if __name__ == "__main__":
    run(main, __doc__)
