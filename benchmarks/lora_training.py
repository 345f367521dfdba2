"""Measures training steps of LoRAs on FLUX.1-dev's shapes with random weights, beside diffusers' training.

    python -m benchmarks.lora_training [--output benchmarks/results/h100-lora-training.json]
                                       [--caps 24,16,12] [--only bf16,diffusers]

Images of 512x512 and 1024x1024, one in a batch, LoRAs of rank 16 in the vital layers and in all. The base is
in bf16 without a cap on GPU memory, in 8-bit floats and in 4 bits under each cap (GiB): more is out of
memory. Checkpointing and streamed blocks are what `python -m flux.lora train` picks with offload "auto".
Beside them stands a step as diffusers' DreamBooth script for FLUX takes it: the same matrices, peft's LoRA,
bf16 under autocast, AdamW, gradients clipped, checkpointed and not. Text encoders and autoencoder are not
loaded, since features are computed before. Milliseconds are medians of four steps after two. `--only` runs
the cases whose names contain one of these texts.

Results are saved after each case; a case that fails does not stop the others. Needs a GPU of 40 GB, 60 GB of
main memory, and no file. `--toy` runs the same on a tiny model, on any machine.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from benchmarks.common import (
    GIB,
    check_full_size,
    clean,
    machine,
    markdown,
    milliseconds,
    names_with,
    toy_plan,
)
from benchmarks.diffusers_models import diffusers_loss, diffusers_transformer
from benchmarks.memory import limit
from benchmarks.random_base import RandomBase, shared
from benchmarks.random_models import CLIP_L, CLIP_TOY, T5_TOY, T5_XXL
from flux.errors import exit_on_input_error
from flux.files import write_json
from flux.lora.adapters import Target, add_adapters, find_targets, prepare_backward
from flux.lora.dataset import Example, TrainingSet
from flux.lora.features import Features
from flux.lora.forecast import Forecaster
from flux.lora.step import noisy, velocity_loss
from flux.lora.trainer import LARGEST_NORM, Trainer
from flux.model import Flux, Inputs
from flux.runtime.devices import pick_device
from flux.runtime.parallel import ALONE
from flux.sampling import image_ids
from flux.settings.command_line import run
from flux.settings.complete import resolve
from flux.settings.fields import LIST
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedTrain
from flux.settings.train import TrainSettings
from flux.specs import VITAL_LAYERS_DEV, ModelSpec, configs

RANK, LEARNING_RATE, DECAY = 16, 1e-4, 1e-4
WARM_UP, MEASURED = 2, 4
CAPTION = "a caption"
PACKED = {"8-bit floats": "fp8", "4 bits": "4bit"}
"""The bases that run under caps by name, and the setting "quantize" of each."""


@dataclass(frozen=True)
class Work:
    """The matrices that are trained, and the image that they are trained on.

    Attributes:
        name: Its name in the results.
        side: The side of the image in pixels.
        targets: The trained matrices.
    """

    name: str
    side: int
    targets: tuple[Target, ...]


def features_of(spec: ModelSpec, side: int, dtype: torch.dtype) -> Features:
    """Draw the latent of one image and the features of its caption."""
    generator, params = torch.Generator().manual_seed(0), spec.params

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator).to(dtype)

    return Features(
        [draw((side // 16) ** 2, params.in_channels)],
        {CAPTION: draw(spec.text_length, params.context_in_dim)},
        {CAPTION: draw(params.vec_in_dim)},
        None,
    )


class Bench:
    """Trains with one base.

    Args:
        base: The model.
    """

    def __init__(self, base: RandomBase):
        self.base, self.spec, self.dtype, self.device = base, base.spec, base.dtype, base.device

    @cache  # noqa: B019  (it lives as long as the process)
    def forecaster(self, work: Work, quantize: str) -> Forecaster:
        """Forecast this work, under any cap: activations are measured once."""
        fields = {
            "model": "flux-dev", "images": "random", "quantize": quantize, "offload": "auto",
            "caption_dropout": 0.0, "sample_prompts": [], "rank": RANK, "learning_rate": LEARNING_RATE,
            "steps": WARM_UP + MEASURED, "device": str(self.device),
        }  # fmt: skip
        settings = resolve(check_settings(TrainSettings, fields))
        example = Example(Path("random"), CAPTION, work.side, work.side)
        return Forecaster(
            settings, self.spec, self.base.opened, work.targets, example, self.device, self.dtype
        )

    def ours(self, work: Work, quantize: str, cap: float | None, checkpointed: bool = False) -> dict:
        """Measure a training as the program takes it under this cap, beside its forecast."""
        limit(self.device, None)
        self.base.model(quantize)  # packed on the GPU before the cap holds
        clean(self.device)
        limit(self.device, cap)
        forecaster = self.forecaster(work, quantize)
        forecast, free = (forecaster.of(True, 0), None) if checkpointed else forecaster.fitting()
        stage = next(stage for stage in forecast.stages if stage.name == "train")
        found = {
            "checkpointing": forecast.checkpointing,
            "streamed": forecast.streamed,
            "parameters": forecast.parameters,
            "free_gib": free and free / GIB,
            "forecast_gib": stage.peak / GIB,
            "forecast_ms": 1000 * forecast.seconds,
        }
        settings: Any = forecaster.settings
        begin = time.perf_counter()
        base = self.base.load(settings, forecast.streamed)
        adapters = add_adapters(base.model, work.targets, 0, self.device)
        prepare_backward(base.model, forecaster.first, forecast.checkpointing)
        found["load_s"] = time.perf_counter() - begin
        trainer = self.trainer(settings, base.model, adapters, forecaster.largest)
        with base.on_device():
            found |= timed(trainer.take_step, self.device)
        return found | {"losses": trainer.losses}

    def trainer(self, settings: ResolvedTrain, model: Flux, adapters: dict, example: Example) -> Trainer:
        """Make the trainer of one image."""
        features = features_of(self.spec, example.width, self.dtype)
        training = TrainingSet((example,), "random")
        return Trainer(settings, self.spec, model, adapters, training, features, ALONE)

    def inputs(self, side: int, seed: int) -> tuple[Inputs, Tensor]:
        """Draw noise and its level; return what a model is given, and the velocity that it should find."""
        features, generator = features_of(self.spec, side, self.dtype), torch.Generator().manual_seed(seed)
        latent = features.latents[0]
        noise, level = torch.randn(latent.shape, generator=generator), torch.rand(1, generator=generator)
        txt = features.txt[CAPTION].to(self.device)
        inputs = Inputs(
            noisy(latent, noise, level).to(self.device, self.dtype),
            image_ids(1, side, side, self.device),
            txt,
            torch.zeros(1, txt.shape[1], 3, device=self.device),
            level.to(self.device, self.dtype),
            features.vec[CAPTION].to(self.device),
            torch.ones(1, device=self.device, dtype=self.dtype),
        )
        return inputs, (noise - latent.float()).to(self.device)

    def theirs(self, work: Work, checkpointing: bool) -> dict:
        """Measure a step as diffusers' script takes it, on the same weights."""
        clean(self.device)
        limit(self.device, None)
        model = shared(self.base.model("none")).to(self.device)
        peer = diffusers_transformer(model)
        inputs, velocity = self.inputs(work.side, 0)
        with torch.no_grad():
            own = velocity_loss(model, inputs, velocity)
            found: dict[str, Any] = {"relative_loss": (diffusers_loss(peer, inputs, velocity) / own).item()}
        begin = time.perf_counter()
        if checkpointing:
            peer.enable_gradient_checkpointing()
        names = [name for target in work.targets for name, _ in target.in_diffusers()]
        peer.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=names)
        )
        peer.train()
        factors = [x for x in peer.parameters() if x.requires_grad]
        optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=DECAY)
        found |= {"checkpointing": checkpointing, "parameters": sum(x.numel() for x in factors)}
        found["load_s"] = time.perf_counter() - begin
        losses: list[float] = []

        def step() -> None:
            inputs, velocity = self.inputs(work.side, 1 + len(losses))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = diffusers_loss(peer, inputs, velocity)
            loss.backward()
            nn.utils.clip_grad_norm_(factors, LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        return found | timed(step, self.device) | {"losses": losses}


def timed(step: Callable[[], object], device: torch.device) -> dict:
    """Take all steps of a case: milliseconds of each that is measured, and the memory at the peak."""
    clean(device)
    for _ in range(WARM_UP):
        step()
    times = [milliseconds(step, device) for _ in range(MEASURED)]
    found: dict[str, Any] = {"ms": times, "median_ms": statistics.median(times)}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def table(results: dict[str, dict]) -> str:
    """Format the results."""
    header = ["", "ms a step", "GiB at the peak", "GiB forecast", "error", "way"]
    rows = []
    for name, found in results.items():
        if "error" in found:
            rows.append([name, "-", "-", "-", "-", found["error"][:70]])
            continue
        peak, forecast = found.get("peak_gib"), found.get("forecast_gib")
        way = ["checkpointed"] * found["checkpointing"]
        way += [f"{found['streamed']} blocks streamed"] if found.get("streamed") else []
        cells = [f"{x:.2f}" if x else "-" for x in (peak, forecast)]
        error = f"{100 * (forecast / peak - 1):+.1f} %" if peak and forecast else "-"
        rows.append([name, f"{found['median_ms']:.1f}", *cells, error, ", ".join(way) or "-"])
    return markdown(header, rows)


def works_of(spec: ModelSpec, sides: Sequence[int], vital: Sequence[int]) -> list[Work]:
    """List what is trained."""
    chosen = {"vital layers": vital, "all layers": range(spec.num_layers)}
    return [
        Work(
            f"{side}x{side} {name}",
            side,
            tuple(find_targets(spec.params, layers, ("attention", "mlp"), RANK, None)),
        )
        for side in sides
        for name, layers in chosen.items()
    ]


def cases_of(bench: Bench, works: Sequence[Work], caps: Sequence[float]) -> dict[str, Callable[[], dict]]:
    """Name the cases."""
    cases: dict[str, Callable[[], dict]] = {}
    for work in works:
        cases[f"bf16: {work.name}"] = partial(bench.ours, work, "none", None)
        cases[f"bf16, checkpointed: {work.name}"] = partial(bench.ours, work, "none", None, True)
        cases[f"diffusers, bf16: {work.name}"] = partial(bench.theirs, work, False)
        cases[f"diffusers, bf16, checkpointed: {work.name}"] = partial(bench.theirs, work, True)
    for form, quantize in PACKED.items():
        for cap in caps:
            for work in works:
                cases[f"{form}, {cap:g} GiB: {work.name}"] = partial(bench.ours, work, quantize, cap)
    return cases


def tried(name: str, case: Callable[[], dict]) -> dict:
    """Run a case. An error becomes its result, so that the others run."""
    begin = time.perf_counter()
    found: dict[str, Any]
    try:
        found = case()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    gc.collect()
    found["s"] = time.perf_counter() - begin
    print(f"{name}: {found}", flush=True)
    return found


@exit_on_input_error()
def main(
    output: str | None = None,
    toy: bool = False,
    device: str = "auto",
    caps: Annotated[tuple[float, ...], LIST] = (24, 16, 12),
    only: str = "",
) -> None:
    """Run the benchmark.

    Args:
        output: JSON file to write to; if not set, none
        toy: measure a tiny model, on any machine
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        caps: caps on GPU memory, in GiB
        only: run only cases whose names contain one of these texts, with commas between them
    """
    where = pick_device(device)
    check_full_size(where, toy)
    if toy:
        plan = toy_plan()
        # Groups of 4 bits need some width.
        spec = replace(plan.spec, params=replace(plan.spec.params, hidden_size=64, axes_dim=[8, 12, 12]))
        dtype, sizes, sides, vital = torch.float32, (T5_TOY, CLIP_TOY), (64, 128), plan.layers
    else:
        spec = configs["flux-dev"]
        dtype, sizes, sides, vital = torch.bfloat16, (T5_XXL, CLIP_L), (512, 1024), VITAL_LAYERS_DEV
    begin = time.perf_counter()
    bench = Bench(RandomBase(spec, dtype, where, *sizes))
    cases = cases_of(bench, works_of(spec, sides, vital), caps)
    results: dict[str, Any] = {"machine": machine(where), "dtype": str(dtype), "rank": RANK, "cases": {}}
    print(f"weights drawn after {time.perf_counter() - begin:.1f} s", flush=True)
    for name in names_with(cases, only):
        results["cases"][name] = tried(name, cases[name])
        if output:
            write_json(output, results)
    results["seconds"] = time.perf_counter() - begin
    if output:
        write_json(output, results)
    print("\n" + table(results["cases"]))


if __name__ == "__main__":
    run(main, __doc__)
