"""Measures a step of FLUX.1's tools, which images steer, at full size with random weights, beside diffusers.

    python -m benchmarks.conditions [--output benchmarks/results/h100-conditions.json] [--only WORDS] [--toy]

The tools, each with an image of 1024x1024 to make:

    flux-dev            nothing else
    flux-dev-kontext    a context image of that size
    flux-dev-fill       a masked image
    flux-dev-canny      a control image; flux-dev-depth has the same shapes
    flux-dev-redux      the 729 text tokens that Redux makes of an image

Each takes a step in the middle of its schedule: eager, compiled, and compiled with 8-bit floats. Beside them
runs diffusers' step of the same inputs, compiled. The results are medians in milliseconds, and the peak of
GPU memory beside the memory plan's forecast for the transformer alone.

The tools share one set of random weights, except for the layer that embeds image tokens. Steps in bfloat16
are interleaved. Those in 8 bits come last, when nothing else is on the GPU. Needs a GPU with 40 GB and no
network, and takes about four minutes, most of them compiling; no case begins after `--minutes`.
`--only kontext,fill` measures the cases whose names contain one of the texts. `--toy` runs the same on a tiny
model, anywhere.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.common import (
    GIB,
    StepSize,
    check_full_size,
    clean,
    full_step,
    machine,
    markdown,
    milliseconds,
    names_with,
    peak_gib,
    random_inputs,
    relative_error,
    sources_of,
    toy_plan,
)
from benchmarks.diffusers_models import diffusers_step
from benchmarks.random_weights import random_transformer
from benchmarks.step_speed import Bench, prepared, toy_step
from flux.conditions.kontext import context_ids
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.inputs import Condition
from flux.model import Flux
from flux.runtime.devices import pick_device
from flux.runtime.estimate import REDUX_TOKENS, MemoryEstimator
from flux.runtime.plan import Plan
from flux.runtime.quantize import check_fp8_support
from flux.sampling import Conditioning, euler_step, get_schedule, model_inputs
from flux.settings.command_line import run
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, configs
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.sources import TensorSource

TOOLS = ("flux-dev", "flux-dev-kontext", "flux-dev-fill", "flux-dev-canny", "flux-dev-redux")
DIFFUSERS = "diffusers compiled"
# Each group is measured with nothing else on the GPU. diffusers comes first, before modulations are computed.
GROUPS: tuple[dict[str, dict], ...] = (
    {DIFFUSERS: {}, "eager": {}, "compiled": {"compiled": True}},
    {"fp8 compiled": {"compiled": True, "fp8": True}},
)
Models = dict[str, Flux | FluxTransformer2DModel]


def spec_of(tool: str, size: StepSize, toy: bool) -> ModelSpec:
    """Return a tool's spec, for transformers of that size."""
    spec = configs[tool]
    params = replace(size.params, in_channels=spec.params.in_channels)
    spec = replace(spec, params=params, size=size.side)
    return replace(spec, ae_params=toy_plan().spec.ae_params, text_length=size.text) if toy else spec


def build(ways: Mapping[str, dict], size: StepSize, device: torch.device, backend: str) -> Models:
    """Build the models of some ways. Weights that none of them needs are freed at the end."""
    bench = Bench(size, device, backend)
    return {
        way: bench.build_diffusers(compiled=True) if way == DIFFUSERS else bench.build(**how)
        for way, how in ways.items()
    }


def set_image_embedder(models: Models, spec: ModelSpec, device: torch.device) -> None:
    """Replace the layer that embeds image tokens by a random one, for as many channels as the spec has."""
    torch.manual_seed(0)
    weights = random_transformer(replace(spec.params, depth=0, depth_single_blocks=0), device)
    with torch.device("meta"):
        layer = nn.Linear(spec.params.in_channels, spec.params.hidden_size)
    layer.load_state_dict({name: weights[f"img_in.{name}"] for name in ("weight", "bias")}, assign=True)
    layer.requires_grad_(False)
    for model in models.values():
        if isinstance(model, Flux):
            model.img_in, model.in_channels = layer, spec.params.in_channels
        else:
            model.x_embedder = layer


class ToolRun:
    """A run of one tool, in the middle of its schedule.

    Args:
        spec: The tool.
        size: The size of the step.
        device: The device.
    """

    def __init__(self, spec: ModelSpec, size: StepSize, device: torch.device):
        noise = replace(spec.params, in_channels=spec.params.out_channels)
        given = random_inputs(replace(size, params=noise, text=spec.text_length), 1, device)
        self.latent, self.ids = given.img, given.img_ids
        self.levels = get_schedule(spec.num_steps, self.latent.shape[1])
        self.cond = Conditioning(given.txt, given.txt_ids, given.y, given.guidance)
        self.cond = self.cond.with_condition(self._condition(spec, size.side).to(self.latent))

    def _condition(self, spec: ModelSpec, side: int) -> Condition:
        """Draw what the tool's image becomes."""
        generator, (_, tokens, channels) = torch.Generator().manual_seed(0), self.latent.shape

        def draw(tokens: int, channels: int) -> Tensor:
            return torch.randn(1, tokens, channels, generator=generator)

        match spec.condition:
            case "kontext":
                return Condition(context=draw(tokens, channels), context_ids=context_ids([(side, side)]))
            case "redux":
                return Condition(txt=draw(REDUX_TOKENS, spec.params.context_in_dim))
            case "fill" | "control":
                return Condition(channels=draw(tokens, spec.params.in_channels - channels))
            case _:
                return Condition()

    def step(self, model: Flux | FluxTransformer2DModel) -> Callable[[], Tensor]:
        """Make the step of our model or of diffusers', which return the velocity."""
        middle = len(self.levels) // 2
        t, t_next = self.levels[middle : middle + 2]
        if isinstance(model, FluxTransformer2DModel):
            return diffusers_step(model, model_inputs(self.latent, self.ids, self.cond, t))
        # The models share these: their weights are the same.
        cond = self.cond = self.cond.scheduled(model, self.levels[:-1])
        return lambda: euler_step(model, self.latent, self.ids, cond, t, t_next).velocity


def forecast_gib(tool: str, spec: ModelSpec, fp8: bool, on_gpu: bool) -> float:
    """Forecast the peak while an image is denoised, with the transformer alone on the device, in GiB."""
    transformer = sources_of(dict(on_meta(Flux, spec.params).named_parameters()))
    sources: dict[Part, dict[str, TensorSource]]
    sources = {"transformer": transformer, "vae": {}, "text_encoder": {}, "text_encoder_2": {}}
    settings = ModelSettings(model=tool, width=spec.size, height=spec.size, quantize="fp8" if fp8 else "none")
    estimate = MemoryEstimator(settings, spec, sources, torch.bfloat16, torch.bfloat16, on_gpu)
    return Plan.of(estimate, "model")["denoise"].peak / GIB


def measure(
    steering: ToolRun, models: Models, device: torch.device, rounds: int
) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """Measure a tool's steps by each model, interleaved. Return what it found, and their velocities."""
    found, ready, velocities = {}, {}, {}
    for way, model in models.items():
        step, found[way] = prepared(lambda model=model: steering.step(model))
        if step is None:
            continue
        clean(device)
        velocities[way] = step().float().cpu()
        found[way] |= {"peak_gib": peak_gib(device) or None, "ms": []}
        ready[way] = step
    for _ in range(rounds):
        for way, step in ready.items():
            step()  # so that no way pays for the one before it
            found[way]["ms"].append(milliseconds(step, device))
    for way in ready:
        found[way]["median_ms"] = statistics.median(found[way]["ms"])
    return found, velocities


def measure_group(
    group: Mapping[str, dict],
    names: Sequence[str],
    specs: Mapping[str, ModelSpec],
    size: StepSize,
    device: torch.device,
    backend: str,
) -> Iterator[tuple[str, dict[str, dict], dict[str, Tensor]]]:
    """Build the models of a group of ways, and measure each tool's cases that are among the names.

    Yields:
        The tool, and what `measure` returns.
    """
    ways = {way: how for way, how in group.items() if any(f"{tool}, {way}" in names for tool in specs)}
    clean(device)  # of the group before
    models = build(ways, size, device, backend) if ways else {}
    for tool, spec in specs.items():
        of_tool = {way: model for way, model in models.items() if f"{tool}, {way}" in names}
        if of_tool:
            set_image_embedder(of_tool, spec, device)
            yield tool, *measure(ToolRun(spec, size, device), of_tool, device, size.rounds // 2)


def table(found: Mapping[str, dict]) -> str:
    """Format the results: a row for each tool and way."""
    rows = []
    for name, entry in found.items():
        tool = name.split(", ", 1)[0]
        theirs, ms = found.get(f"{tool}, {DIFFUSERS}", {}).get("median_ms"), entry.get("median_ms")
        ratio = theirs / ms if theirs and ms else None
        numbers = (ms, ratio, entry.get("peak_gib"), entry.get("planned_gib"), entry.get("difference"))
        cells = [
            "-" if x is None else f"{x:.{digits}f}"
            for x, digits in zip(numbers, (1, 2, 2, 2, 4), strict=True)
        ]
        rows.append([name, *cells, entry.get("error", "")[:60]])
    header = ["step", "ms", "to diffusers", "GiB at the peak", "GiB planned", "difference", "error"]
    return markdown(header, rows)


@exit_on_input_error()
@torch.no_grad()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    backend: str = "inductor",
    only: str = "",
    minutes: float = 4,
) -> None:
    """Run the benchmark.

    Args:
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        backend: backend of torch.compile
        only: measure only cases whose names contain one of these texts, with commas between them
        minutes: no case begins after so many
    """
    begin, size, where = time.monotonic(), toy_step() if toy else full_step(), pick_device(device)
    check_full_size(where, toy)
    check_fp8_support(where, torch.bfloat16)
    specs = {tool: spec_of(tool, size, toy) for tool in TOOLS}
    names = names_with([f"{tool}, {way}" for ways in GROUPS for tool in TOOLS for way in ways], only)
    results: dict[str, Any] = {"machine": machine(where), "side": size.side, "cases": {}}
    found, velocities = results["cases"], {}
    groups = (measure_group(group, names, specs, size, where, backend) for group in GROUPS)
    for tool, entries, answers in chain.from_iterable(groups):
        velocities |= {f"{tool}, {way}": answer for way, answer in answers.items()}
        theirs = velocities.get(f"{tool}, {DIFFUSERS}")
        # All ways of a group hold their weights in one form.
        fp8 = any("fp8" in way for way in entries)
        planned = forecast_gib(tool, specs[tool], fp8, where.type == "cuda")
        for way, entry in entries.items():
            if way != DIFFUSERS:
                entry["planned_gib"] = planned
                if way in answers and theirs is not None:
                    entry["difference"] = relative_error(answers[way], theirs)
            found[f"{tool}, {way}"] = entry
            print(f"{time.monotonic() - begin:.0f} s, {tool}, {way}: {entry}", flush=True)
        if output:
            write_json(output, results)
        left = [name for name in names if name not in found]
        if left and time.monotonic() - begin > 60 * minutes:
            print(f"{minutes:g} minutes are over, left out: {'; '.join(left)}", flush=True)
            break
    print("\n" + table(found))


if __name__ == "__main__":
    run(main, __doc__)
