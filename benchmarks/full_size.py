"""Measures FLUX.1-dev at full size, with random weights, beside diffusers: loading, steps, memory.

    python -m benchmarks.full_size --folder /tmp/random-flux [--output benchmarks/results/GPU.json]

Writes 24 GB to the folder once. Needs a GPU with 48 GB and no network. `--toy` runs the same on a tiny model,
on any machine; `--compiled=False` leaves out what takes minutes to compile.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from benchmarks.common import (
    EDITS,
    GIB,
    GUIDANCE,
    PROMPT,
    PassClock,
    RunPlan,
    Work,
    check_full_size,
    full_plan,
    load_random,
    machine,
    markdown,
    peak_gib,
    relative_error,
    toy_plan,
)
from benchmarks.diffusers_models import diffusers_pipeline
from flux.editing.edit import edit
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.loaded_model import LoadedModel
from flux.runtime.devices import pick_device
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import Edit, EditSettings


def measure(
    run: Callable[[int], object], steps: int, passes: int, last: nn.Module, device: torch.device
) -> dict:
    """Measure seconds, milliseconds a step and memory of `run(steps)`, after two steps that warm up.

    Args:
        run: Runs so many steps.
        steps: The number of steps to measure.
        passes: The number of the transformer's passes in a step.
        last: The transformer's last module.
        device: The device of the transformer.
    """
    begin = time.perf_counter()
    run(2)
    result: dict[str, Any] = {"warm_up_s": time.perf_counter() - begin}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with PassClock(last, device) as clock:
        run(steps)
    result["step_ms"] = clock.step_ms(passes)
    result["wall_s"] = time.perf_counter() - begin
    if device.type == "cuda":
        result |= {"peak_steps_gib": clock.peak_gib, "peak_gib": peak_gib(device)}
    return result


def measure_ours(pipe: LoadedModel, work: Work, layers: tuple[int, ...]) -> dict:
    """Measure our pipeline."""
    size = {"width": work.width, "height": work.height, "guidance": GUIDANCE, "progress": False}

    def image(num_steps: int) -> None:
        pipe.generate([PROMPT], [0], num_steps=num_steps, **size)

    def edits(num_steps: int) -> None:
        entries = tuple(Edit(prompt=prompt) for prompt in EDITS)
        settings = EditSettings(
            prompt=PROMPT, edits=entries, dose="paper", batch_size=work.at_once, num_steps=num_steps,
            width=work.width, height=work.height, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
        )  # fmt: skip
        edit(pipe, resolve(settings), layers, progress=False)

    run, passes = (edits, 1 + len(EDITS) // work.at_once) if work.at_once else (image, 1)
    return measure(run, work.steps, passes, pipe.model.final_layer, pipe.device)


def measure_diffusers(theirs: FluxPipeline, pipe: LoadedModel, work: Work) -> dict:
    """Measure diffusers' pipeline."""
    cond = pipe.condition([PROMPT, *EDITS][: work.diffusers_rows], GUIDANCE)
    # Copies, since diffusers does not work in inference mode.
    given: dict[str, Any] = {"prompt_embeds": cond.txt.clone(), "pooled_prompt_embeds": cond.vec.clone()}
    given |= {"width": work.width, "height": work.height, "guidance_scale": GUIDANCE}

    def images(num_steps: int) -> None:
        theirs(**given, num_inference_steps=num_steps, generator=torch.Generator().manual_seed(0))

    return measure(images, work.steps, 1, theirs.transformer.proj_out, pipe.device)


@torch.no_grad()
def velocities(pipe: LoadedModel, theirs: FluxPipeline, work: Work) -> tuple[Tensor, Tensor]:
    """Compute both transformers' velocity of the same latent, `1 I 64` each."""
    cond = pipe.condition([PROMPT], GUIDANCE)
    txt, vec, latent = cond.txt.clone(), cond.vec.clone(), pipe.noise([0], work.width, work.height)
    ids = pipe.image_ids(1, work.width, work.height)
    t = torch.full((1,), 0.5, device=pipe.device, dtype=pipe.dtype)
    ours = pipe.model(latent, ids, txt, cond.txt_ids, t, vec, cond.guidance)
    other = theirs.transformer(
        hidden_states=latent,
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        guidance=torch.full((1,), GUIDANCE, device=pipe.device),
        img_ids=ids[0],
        txt_ids=cond.txt_ids[0],
    ).sample
    return ours.float(), other.float()


def table(plan: RunPlan, results: dict) -> str:
    """Format milliseconds a step, eager and compiled, and GiB at the peak of the eager runs."""
    columns = ["ms a step"]
    for mode in ("eager", "compiled"):
        columns += [f"ours {mode}", f"diffusers {mode}", "ratio"]
    rows = []
    for work in plan.work:
        row = [work.name]
        for mode in ("eager", "compiled"):
            found = [results["steps"].get(f"{who}, {mode}, {name}", {}) for who, name in names(work)]
            ours, theirs = (entry.get("step_ms", {}).get("median") for entry in found)
            row += [number(ours), number(theirs), f"{theirs / ours:.2f}" if ours and theirs else "-"]
        peaks = [
            results["steps"].get(f"{who}, eager, {name}", {}).get("peak_gib") for who, name in names(work)
        ]
        rows.append([*row, *map(number, peaks)])
    return markdown([*columns, "GiB ours", "GiB diffusers"], rows)


def number(value: float | None) -> str:
    """Format a number, or a dash."""
    return f"{value:.1f}" if value else "-"


def names(work: Work) -> list[tuple[str, str]]:
    """Name who does the work, and its name in the results. One batch of diffusers serves several works."""
    return [("ours", work.name), ("diffusers", f"{work.width}x{work.height}, batch {work.diffusers_rows}")]


def measure_all(
    plan: RunPlan, pipe: LoadedModel, theirs: FluxPipeline, mode: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure each work of the plan by both.

    Yields:
        The name in the results, and what was measured.
    """
    done = set()
    for work in plan.work:
        for who, name in names(work):
            if (who, name) in done:
                continue
            done.add((who, name))
            try:
                if who == "ours":
                    found = measure_ours(pipe, work, plan.layers)
                else:
                    found = measure_diffusers(theirs, pipe, work)
            except RuntimeError as error:
                # The other numbers are useful when one runs out of memory or does not compile.
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            yield f"{who}, {mode}, {name}", found


@exit_on_input_error()
def main(
    folder: str, output: str | None = None, toy: bool = False, device: str = "auto", compiled: bool = True
) -> None:
    """Run the benchmark.

    Args:
        folder: folder of the random weights, written if they are not there
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        compiled: measure the compiled model too
    """
    plan, where = toy_plan() if toy else full_plan(), pick_device(device)
    check_full_size(where, toy)
    results: dict[str, Any] = {"machine": machine(where), "model": plan.model, "dtype": plan.dtype}

    def note(name: str, found: object, part: dict = results) -> None:
        part[name] = found
        print(f"{name}: {found}", flush=True)
        if output:
            write_json(output, results)

    pipe, written = load_random(plan, folder, where)
    note("write_s", written)
    note("load_s", pipe.timings["load"])
    if where.type == "cuda":
        note("loaded_gib", torch.cuda.memory_allocated() / GIB)
        note("load_peak_gib", torch.cuda.max_memory_allocated() / GIB)
    theirs = diffusers_pipeline(pipe.model, plan.spec.ae_params, pipe.dtype)

    eager = velocities(pipe, theirs, plan.work[0])
    note("ours_to_diffusers", relative_error(*eager))
    steps = results["steps"] = {}
    for key, found in measure_all(plan, pipe, theirs, "eager"):
        note(key, found, steps)
    if compiled:
        # As the setting `compile` does while loading, but on the weights that are loaded already.
        pipe.model.compile_blocks()
        theirs.transformer.compile_repeated_blocks(fullgraph=True)
        for key, found in measure_all(plan, pipe, theirs, "compiled"):
            note(key, found, steps)
        pairs = zip(velocities(pipe, theirs, plan.work[0]), eager, strict=True)
        note("compiled_to_eager", [relative_error(*pair) for pair in pairs])
    print("\n" + table(plan, results))


if __name__ == "__main__":
    run(main, __doc__)
