"""FLUX.1-dev at full size, with random weights, beside diffusers: loading, steps, memory.

    python -m benchmarks.full_size --folder /tmp/random-flux [--output benchmarks/results/CARD.json]

Writes 24 GB to the folder once. Needs a GPU with 48 GB and no network. `--toy` runs the same on a tiny model,
on any machine; `--compiled=False` leaves out what takes minutes to compile.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import fire
import torch
from torch import Tensor, nn

from benchmarks.diffusers_peer import peer_pipeline
from benchmarks.random_weights import write_stand_ins
from benchmarks.report import GIB, PassClock, machine, markdown
from flux.editing.edit import edit
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.pipeline import Pipeline
from flux.runtime.devices import pick_device
from flux.settings.complete import whole_tokens
from flux.settings.demos import ModelSettings
from flux.settings.edits import EditSettings
from flux.specs import ModelSpec, configs

PROMPT = "a photo of a dog on the grass"
EDITS = ["a photo of a cat on the grass", "a photo of a dog on the beach", "a photo of a white dog"]
GUIDANCE = 3.5


@dataclass(frozen=True)
class Work:
    """One thing to measure.

    Attributes:
        at_once: edits in one batch; 0: a picture alone.
        peer_rows: pictures in the batch that diffusers makes beside it; for edits the reference and them.
    """

    name: str
    width: int
    height: int
    steps: int
    at_once: int = 0
    peer_rows: int = 1


@dataclass(frozen=True)
class Plan:
    """Which model, in which dtype, does which work, with which layers injected."""

    model: str
    spec: ModelSpec
    dtype: str
    layers: tuple[int, ...]
    work: list[Work]


def full_plan() -> Plan:
    spec = configs["flux-dev"]
    wide, high = whole_tokens(1080, "width"), whole_tokens(720, "height")
    # Another size comes last: compiled blocks are specialised to the first and general from the second on.
    work = [
        Work("1024x1024", 1024, 1024, steps=12),
        Work("1024x1024, 3 edits one by one", 1024, 1024, steps=6, at_once=1, peer_rows=4),
        Work("1024x1024, 3 edits at once", 1024, 1024, steps=6, at_once=3, peer_rows=4),
        Work(f"1080x720 ({wide}x{high})", wide, high, steps=12),
    ]
    return Plan("flux-dev", spec, "bfloat16", spec.vital_layers, work)


def toy_plan() -> Plan:
    dev = configs["flux-dev"]
    sizes = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6]}
    spec = replace(
        dev,
        params=replace(dev.params, **sizes, vec_in_dim=8, context_in_dim=16),
        ae_params=replace(dev.ae_params, ch=8, num_res_blocks=1, num_groups=4),
        text_length=16,
    )
    work = [
        Work("64x64", 64, 64, steps=3),
        Work("64x64, 3 edits one by one", 64, 64, steps=3, at_once=1, peer_rows=4),
        Work("64x64, 3 edits at once", 64, 64, steps=3, at_once=3, peer_rows=4),
        Work("96x48", 96, 48, steps=3),
    ]
    return Plan("toy", spec, "float32", (0, 1, 3), work)


@contextmanager
def known(plan: Plan) -> Iterator[None]:
    """The plan's model can be loaded by its name, for as long as the block lasts."""
    before = dict(configs)
    configs[plan.model] = plan.spec
    try:
        yield
    finally:
        configs.clear()
        configs.update(before)


def measure(
    run: Callable[[int], object], steps: int, passes: int, last: nn.Module, device: torch.device
) -> dict:
    """Seconds, milliseconds a step and memory of `run(steps)`, after two steps to warm up and to compile.

    Args:
        passes: of the transformer in each step.
        last: the transformer's last module.
    """
    begin = time.perf_counter()
    run(2)
    result = {"warm_up_s": time.perf_counter() - begin}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with PassClock(last, device) as clock:
        run(steps)
    result["step_ms"] = clock.step_ms(passes)
    result["wall_s"] = time.perf_counter() - begin
    if device.type == "cuda":
        result |= {"peak_steps_gib": clock.peak_gib, "peak_gib": torch.cuda.max_memory_allocated() / GIB}
    return result


def measure_ours(pipe: Pipeline, work: Work, layers: tuple[int, ...]) -> dict:
    size = {"width": work.width, "height": work.height, "guidance": GUIDANCE, "progress": False}

    def picture(num_steps: int) -> None:
        pipe.generate([PROMPT], [0], num_steps=num_steps, **size)

    def edits(num_steps: int) -> None:
        settings = EditSettings(
            prompt=PROMPT, edits=EDITS, dose="paper", batch_size=work.at_once, num_steps=num_steps,
            width=work.width, height=work.height, guidance=GUIDANCE, true_cfg=1.0, watermark=False,
        )  # fmt: skip
        edit(pipe, settings, layers, progress=False)

    run, passes = (edits, 1 + len(EDITS) // work.at_once) if work.at_once else (picture, 1)
    return measure(run, work.steps, passes, pipe.model.final_layer, pipe.device)


def measure_peer(peer, pipe: Pipeline, work: Work) -> dict:
    cond = pipe.condition([PROMPT, *EDITS][: work.peer_rows], GUIDANCE)
    # Copies, for diffusers does not work in inference mode.
    texts = {"prompt_embeds": cond.txt.clone(), "pooled_prompt_embeds": cond.vec.clone()}
    size = {"width": work.width, "height": work.height, "guidance_scale": GUIDANCE}

    def pictures(num_steps: int) -> None:
        peer(**texts, **size, num_inference_steps=num_steps, generator=torch.Generator().manual_seed(0))

    return measure(pictures, work.steps, 1, peer.transformer.proj_out, pipe.device)


@torch.no_grad()
def velocities(pipe: Pipeline, peer, work: Work) -> tuple[Tensor, Tensor]:
    """Both transformers' answer to the same latent, "1 I 64" each."""
    cond = pipe.condition([PROMPT], GUIDANCE)
    txt, vec, latent = cond.txt.clone(), cond.vec.clone(), pipe.noise([0], work.width, work.height)
    ids = pipe.image_ids(1, work.width, work.height)
    t = torch.full((1,), 0.5, device=pipe.device, dtype=pipe.dtype)
    ours = pipe.model(latent, ids, txt, cond.txt_ids, t, vec, cond.guidance)
    theirs = peer.transformer(
        hidden_states=latent,
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        guidance=cond.guidance.float(),
        img_ids=ids[0],
        txt_ids=cond.txt_ids[0],
    ).sample
    return ours.float(), theirs.float()


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def table(plan: Plan, results: dict) -> str:
    """Milliseconds a step, eager and compiled, and GiB at the eager runs' peak."""
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
    return f"{value:.1f}" if value else "-"


def names(work: Work) -> list[tuple[str, str]]:
    """Who does it, and under which name the results keep it: one batch of diffusers serves several works."""
    return [("ours", work.name), ("diffusers", f"{work.width}x{work.height}, batch {work.peer_rows}")]


@exit_on_input_error()
def main(
    folder: str, output: str | None = None, toy: bool = False, device: str = "auto", compiled: bool = True
) -> None:
    plan, where = toy_plan() if toy else full_plan(), pick_device(device)
    results = {"machine": machine(where), "model": plan.model, "dtype": plan.dtype}
    results["machine"]["versions"]["diffusers"] = metadata.version("diffusers")

    def note(name: str, found: object, part: dict = results) -> None:
        part[name] = found
        print(f"{name}: {found}", flush=True)
        if output:
            write_json(output, results)

    begin = time.perf_counter()
    words = {word for prompt in (PROMPT, *EDITS) for word in prompt.split()}
    files = write_stand_ins(Path(folder) / plan.model, plan.spec, words, where)
    if where.type == "cuda":
        torch.cuda.empty_cache()
    note("write_s", time.perf_counter() - begin)
    settings = ModelSettings(
        model=plan.model,
        weights=str(files.flow),
        ae_weights=str(files.ae),
        text_encoders=str(files.text),
        device=str(where),
        dtype=plan.dtype,
    )
    with known(plan):
        pipe = Pipeline.load(settings)
    note("load_s", pipe.timings["load"])
    if where.type == "cuda":
        note("loaded_gib", torch.cuda.memory_allocated() / GIB)
        note("load_peak_gib", torch.cuda.max_memory_allocated() / GIB)
    peer = peer_pipeline(pipe.model, plan.spec.ae_params, pipe.dtype)

    eager, theirs = velocities(pipe, peer, plan.work[0])
    note("ours_to_diffusers", relative_error(eager, theirs))
    steps = results["steps"] = {}
    for mode in ("eager", "compiled") if compiled else ("eager",):
        if mode == "compiled":
            # What the setting `compile` does on loading; here on the weights that are there already.
            pipe.model.compile_blocks()
            peer.transformer.compile_repeated_blocks(fullgraph=True)
        for work in plan.work:
            for who, name in names(work):
                key = f"{who}, {mode}, {name}"
                if key in steps:
                    continue
                try:
                    ours = who == "ours"
                    found = measure_ours(pipe, work, plan.layers) if ours else measure_peer(peer, pipe, work)
                except RuntimeError as error:
                    # The others' numbers are worth having when one runs out of memory or does not compile.
                    found = {"error": f"{type(error).__name__}: {error}"[:2000]}
                note(key, found, steps)
    if compiled:
        again = velocities(pipe, peer, plan.work[0])
        note(
            "compiled_to_eager", [relative_error(*pair) for pair in zip(again, (eager, theirs), strict=True)]
        )
    print("\n" + table(plan, results))


if __name__ == "__main__":
    fire.Fire(main)
