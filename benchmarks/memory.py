"""Measures FLUX.1-dev with random weights under caps on GPU memory: does each plan hold, at what cost?

    python -m benchmarks.memory [--output benchmarks/results/GPU-memory.json] [--caps 24,16,12,8]
                                [--only Q4_K,blocks] [--minutes 7]

Makes an image and an edit of 1024x1024 with each form of the transformer's weights, as loaded (bf16, 8-bit
floats and GGUF's blocks as files hold them) or packed while loading: everything on the GPU, and with the plan
that "auto" picks under each cap (GiB). Beside them it measures diffusers on the same weights: groups of one
block offloaded, and the same GGUF blocks. `--only` runs the cases whose names contain one of these texts.

Results are saved after each case. With the same --output it resumes. No case begins after so many minutes.
Needs a GPU, 100 GB of main memory, and no file. `--toy` runs the same on a tiny model, on any machine.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from benchmarks.common import (
    EDITS,
    GIB,
    GUIDANCE,
    PROMPT,
    PassClock,
    check_full_size,
    clean,
    machine,
    markdown,
    names_with,
    peak_gib,
    toy_plan,
)
from benchmarks.diffusers_models import diffusers_pipeline, to_diffusers_names
from benchmarks.gguf_linears import diffusers_linear
from benchmarks.random_models import CLIP_L, CLIP_TOY, T5_TOY, T5_XXL, RandomModels
from flux.editing.edit import edit
from flux.errors import InputError, exit_on_input_error
from flux.files import write_json
from flux.modules import gguf_blocks
from flux.runtime.devices import pick_device
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import Plan, free_memory
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.edits import Edit, EditSettings
from flux.settings.fields import LIST
from flux.settings.resolved import ResolvedEdit
from flux.specs import VITAL_LAYERS_DEV, configs
from flux.vital_layers import find_vital_layers

STEPS = 5
WIDTH_TOY = {"hidden_size": 256, "axes_dim": [16, 56, 56]}  # of GGUF's largest blocks


@dataclass(frozen=True)
class Case:
    """One way to hold the weights.

    Attributes:
        name: Its name in the results.
        offload: The setting "offload".
        file: The form of the matrices in the transformer's blocks as they are loaded.
        quantize: The setting "quantize".
        t5: The setting "t5".
        cap: The cap on GPU memory in GiB, for "auto".
    """

    name: str
    offload: Literal["none", "model", "blocks", "auto"] = "none"
    file: str = "BF16"
    quantize: str = "none"
    t5: str = "same"
    cap: float | None = None


FORMS = [
    Case("bf16"),
    Case("8 bits", quantize="8bit", t5="8bit"),
    Case("4 bits", quantize="4bit", t5="8bit"),
    Case("fp8 products", quantize="fp8"),
    Case("fp8 file", file="F8_E4M3", quantize="8bit"),
    Case("GGUF Q8_0", file="Q8_0"),
    Case("GGUF Q4_K", file="Q4_K"),
]


def cases_of(form: Case, caps: tuple[float, ...]) -> list[Case]:
    """List the cases of a form: on the GPU, offloaded if it is the plain one, and under each cap."""
    offloads = ("model", "blocks") if form.name == "bf16" else ()
    return [
        form,
        *(replace(form, name=f"{form.name}, {offload}", offload=offload) for offload in offloads),
        *(replace(form, name=f"{form.name}, {cap:g} GiB", offload="auto", cap=cap) for cap in caps),
    ]


def limit(device: torch.device, cap: float | None) -> None:
    """Limit this process to so many GiB of the GPU. If None, it may use all."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap * GIB / total) if cap else 1.0)


def case_plan(estimate: MemoryEstimator, case: Case, device: torch.device) -> Plan:
    """Plan a case: as "auto" does for the memory that is free, or as its setting "offload" says."""
    if case.offload == "auto":
        free = free_memory(device)
        return Plan.of(estimate, "none") if free is None else Plan.fitting(estimate, free)
    if case.offload == "blocks":
        return Plan.of(estimate, "blocks", len(estimate.transformer.blocks), len(estimate.t5.blocks))
    return Plan.of(estimate, case.offload)


def run_case(models: RandomModels, case: Case, settings: ResolvedEdit, device: torch.device) -> dict:
    """Measure an image and an edit: planned and actual peaks, and milliseconds a step."""
    clean(device)
    limit(device, case.cap)
    settings = settings.model_copy(update={"offload": case.offload, "quantize": case.quantize, "t5": case.t5})
    estimate = MemoryEstimator(
        settings, models.spec, models.sources, models.dtype, models.dtype, device.type == "cuda"
    )
    plan = case_plan(estimate, case, device)
    begin = time.perf_counter()
    loaded = models.load(settings, plan)
    found = {"place_s": time.perf_counter() - begin, "offload": plan.offload, "streamed": plan.streamed}
    found |= {"streamed_t5": plan.streamed_t5, "planned_gib": plan.peak / GIB}
    clean(device)

    def timed(name: str, work: Callable[[], object], passes: int) -> None:
        begin = time.perf_counter()
        with PassClock(loaded.model.final_layer, device) as clock:
            work()
        found[f"{name}_ms"] = clock.step_ms(passes)["median"]
        found[f"{name}_s"] = time.perf_counter() - begin

    sampling = {**settings.sampling(), "watermark": False, "progress": False}
    timed("image", lambda: loaded.generate([PROMPT], [0], **sampling), passes=1)
    found["image_gib"] = peak_gib(device)
    layers = find_vital_layers(settings.vital_layers, models.spec)
    timed("edit", lambda: edit(loaded, settings, layers, progress=False), passes=2)
    found["peak_gib"] = peak_gib(device)
    return found


def offload_in_groups(transformer: nn.Module, _: RandomModels, device: torch.device) -> None:
    """Offload diffusers' blocks in groups of one, on a separate stream."""
    from diffusers.hooks.group_offloading import apply_group_offloading

    on_gpu = device.type == "cuda"
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        record_stream=on_gpu,
    )


def pack_as_gguf(transformer: nn.Module, models: RandomModels, device: torch.device) -> None:
    """Put the packed matrices into diffusers' own layers, on the device."""
    packed = models.packed_matrices()
    kind = next(iter(packed.values())).kind
    rows = {name: x.rows for name, x in packed.items()}
    for name, part in to_diffusers_names(rows, models.spec.params.hidden_size).items():
        parent, _, own = name.removesuffix(".weight").rpartition(".")
        module = transformer.get_submodule(parent)
        old = getattr(module, own)
        layer = diffusers_linear(part, kind, old.in_features, models.dtype)
        layer.bias = old.bias
        setattr(module, own, layer)
    transformer.to(device)


def run_diffusers(
    models: RandomModels,
    place: Callable[[nn.Module, RandomModels, torch.device], None],
    settings: ResolvedEdit,
    device: torch.device,
) -> dict:
    """Measure diffusers' pipeline on the same weights, placed by `place`. Texts are random features."""
    clean(device)
    limit(device, None)
    begin = time.perf_counter()
    spec, dtype = models.spec, models.dtype
    pipeline = diffusers_pipeline(models.plain.build("transformer"), spec.ae_params, dtype)
    place(pipeline.transformer, models, device)
    pipeline.vae.to(device)
    found = {"place_s": time.perf_counter() - begin}
    txt, vec = (1, spec.text_length, spec.params.context_in_dim), (1, spec.params.vec_in_dim)
    texts: dict[str, Any] = {
        "prompt_embeds": torch.randn(txt, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.randn(vec, device=device, dtype=dtype),
    }
    clean(device)
    with torch.no_grad(), PassClock(pipeline.transformer.proj_out, device) as clock:
        pipeline(**texts, width=settings.width, height=settings.height, num_inference_steps=STEPS)
    return found | {"image_ms": clock.step_ms(1)["median"], "peak_gib": peak_gib(device)}


def table(results: dict[str, dict]) -> str:
    """Format the results."""
    columns = ["", "plan", "streamed", "planned GiB", "peak GiB", "ms a step", "ms an edit's step", "error"]
    keys = ("offload", "streamed", "planned_gib", "peak_gib", "image_ms", "edit_ms", "error")
    rows = []
    for name, found in results.items():
        values = (found.get(key, "-") for key in keys)
        texts = (f"{x:.2f}" if isinstance(x, float) else str(x)[:60] for x in values)
        rows.append([name, *texts])
    return markdown(columns, rows)


Work = dict[str, Callable[[RandomModels], dict]]


def work_of(form: Case, caps: tuple[float, ...], settings: ResolvedEdit, device: torch.device) -> Work:
    """Name what is run with models of this form."""
    work: Work = {
        case.name: partial(run_case, case=case, settings=settings, device=device)
        for case in cases_of(form, caps)
    }
    diffusers = partial(run_diffusers, settings=settings, device=device)
    if form.name == "bf16":
        work["diffusers, bf16 in groups of one block"] = partial(diffusers, place=offload_in_groups)
    if form.file in gguf_blocks.BLOCKS:
        work[f"diffusers, {form.name}"] = partial(diffusers, place=pack_as_gguf)
    return work


def full_or_toy(toy: bool, device: torch.device) -> tuple[Callable[[], RandomModels], ResolvedEdit]:
    """Return what draws the models, and the settings of each case, at full size or of a tiny model."""
    spec = configs["flux-dev"]
    layers, side, sizes, dtype = VITAL_LAYERS_DEV, 1024, (T5_XXL, CLIP_L), torch.bfloat16
    if toy:
        plan = toy_plan()
        spec = replace(plan.spec, params=replace(plan.spec.params, **WIDTH_TOY))
        layers, side, sizes, dtype = plan.layers, 64, (T5_TOY, CLIP_TOY), torch.float32
    settings = EditSettings(
        model="flux-dev", prompt=PROMPT, edits=(Edit(prompt=EDITS[0]),), vital_layers=layers,
        width=side, height=side, num_steps=STEPS, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
    )  # fmt: skip
    return lambda: RandomModels(spec, device, dtype, *sizes), resolve(settings)


@exit_on_input_error()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    caps: Annotated[tuple[float, ...], LIST] = (24, 16, 12, 8),
    only: str = "",
    minutes: float = 7,
) -> None:
    """Run the benchmark.

    Args:
        output: JSON file to write to, or to resume
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        caps: caps on GPU memory, in GiB
        only: run only cases whose names contain one of these texts, with commas between them
        minutes: no case begins after so many
    """
    begin, where = time.monotonic(), pick_device(device)
    check_full_size(where, toy)
    draw, settings = full_or_toy(toy, where)
    works = [(form, work_of(form, caps, settings, where)) for form in FORMS]
    wanted = names_with([name for _, work in works for name in work], only)
    plain = draw()
    results: dict[str, Any] = {"machine": machine(where), "dtype": str(plain.dtype), "cases": {}}
    if output and Path(output).is_file():
        results = json.loads(Path(output).read_text())
    for form, work in works:
        todo = [name for name in work if name not in results["cases"] and name in wanted]
        if not todo:
            continue
        models = plain if form.file == "BF16" else plain.packed(form.file)
        for name in todo:
            if time.monotonic() - begin > 60 * minutes:
                print(f"{minutes:g} minutes are over: {name} and what follows is left for the next run")
                break
            try:
                found = work[name](models)
            except (RuntimeError, InputError) as error:
                # A failure of one case does not stop the others.
                found = {"error": f"{type(error).__name__}: {error}"[:500]}
            results["cases"][name] = found
            print(f"{name}: {found}", flush=True)
            if output:
                write_json(output, results)
    print("\n" + table(results["cases"]))


if __name__ == "__main__":
    run(main, __doc__)
