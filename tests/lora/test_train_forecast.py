"""The forecast of a training's memory beside the memory that a real step takes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import full_size, lora_training, tiny_models

from flux.lora.adapters import add_adapters, find_targets, prepare_backward
from flux.lora.dataset import Example, read_training_set
from flux.lora.features import Features
from flux.lora.forecast import ADAPTER_BYTES, Forecaster
from flux.lora.train import make_plan
from flux.lora.trainer import Trainer
from flux.model import Flux
from flux.runtime.activations import LiveBytes
from flux.runtime.parallel import ALONE
from flux.runtime.plan import GIB
from flux.runtime.quantize import quantize_linears
from flux.settings.complete import resolve
from flux.settings.files import check_settings
from flux.settings.train import TrainSettings
from flux.specs import VITAL_LAYERS_DEV, configs

pytestmark = [pytest.mark.gradients, pytest.mark.usefixtures("tiny_nano")]


def trainer_of(plan, bits: int = 16) -> Trainer:
    """A trainer on random features, in the way that the plan says."""
    spec, params = plan.spec, plan.spec.params
    model = tiny_models.randomized(Flux(params), 0)
    if bits < 16:
        quantize_linears([model.double_blocks, model.single_blocks], bits)
    adapters = add_adapters(model, plan.targets, 0, "cpu")
    prepare_backward(model, min(plan.layers), plan.forecast.checkpointing)
    latents = [
        torch.randn(1, each.width // 16 * (each.height // 16), params.in_channels)
        for each in plan.training.examples
    ]
    texts = plan.training.captions
    txt = {text: torch.randn(1, spec.text_length, params.context_in_dim) for text in texts}
    vec = {text: torch.randn(1, params.vec_in_dim) for text in texts}
    features = Features(latents, txt, vec, None)
    return Trainer(plan.settings, spec, model, adapters, plan.training, features, ALONE)


@pytest.mark.parametrize("checkpointing", ["on", "off"])
@pytest.mark.parametrize(("quantize", "bits"), [("none", 16), ("8bit", 8)])
def test_a_step_takes_what_was_forecast(tmp_path, checkpointing, quantize, bits):
    """Activations, gradients included, measured 1.00 to 1.03 of the forecast."""
    fields = {"checkpointing": checkpointing, "quantize": quantize, "caption_dropout": 0.0, "batch_size": 3}
    images = lora_training.write_images(tmp_path / "images")
    (images / "2.png").unlink()  # the only one of another shape
    plan = make_plan(lora_training.settings(tmp_path, sizes=[64], rank=1, **fields))
    trainer = trainer_of(plan, bits)
    trainer.take_step()  # which makes the optimiser's moments
    held = [*trainer.model.parameters(), *trainer.model.buffers()]
    held += [x for state in trainer.optimizer.state.values() for x in state.values()]
    with LiveBytes(held) as live:
        trainer.take_step()
    stage = next(stage for stage in plan.forecast.stages if stage.name == "train")
    forecast = stage.activations + 4 * plan.forecast.parameters
    assert 0.97 < live.peak / forecast < 1.06


def test_norms_on_a_gpu_keep_their_input(tmp_path, monkeypatch):
    """In bfloat16, queries and keys in float32 have four times a stream's bytes. Their input is kept anyway
    in single-stream blocks; in double-stream blocks it is part of three streams. That spares ten at most.
    """
    from flux.lora import forecast

    monkeypatch.setattr(forecast, "operations_per_second", lambda *_: 1e9)
    plan = make_plan(lora_training.settings(tmp_path, layers="all", checkpointing="off", sizes=[64]))
    activations = []
    for name in ("cpu", "cuda"):
        stages = Forecaster(
            plan.settings, plan.spec, plan.opened, plan.targets, plan.training.largest, torch.device(name),
            torch.bfloat16,
        ).of(checkpointing=False, streamed=0).stages  # fmt: skip
        activations.append(next(stage.activations for stage in stages if stage.name == "train"))
    width, height = plan.training.largest.size
    stream = 2 * (width // 16 * (height // 16) + plan.spec.text_length) * plan.spec.params.hidden_size
    workspace = 32 * 2**20
    spared = (activations[0] - activations[1] + workspace) / stream
    assert 6 < spared < 10


def test_weights_and_factors_are_counted(tmp_path):
    plan = make_plan(lora_training.settings(tmp_path, sample_prompts=[]))
    stage = next(stage for stage in plan.forecast.stages if stage.name == "train")
    weights = sum(x.nbytes for x in Flux(plan.spec.params).parameters())
    assert plan.forecast.parameters == sum(x.numel() for x in trainer_of(plan).factors.values())
    assert stage.weights == weights + ADAPTER_BYTES * plan.forecast.parameters
    assert [each.name for each in plan.forecast.stages] == ["encode images", "encode texts", "train"]


def test_samples_have_a_size_of_their_own(tmp_path):
    """Samples that are larger than the training images need more memory, and the other stages do not."""
    peaks = []
    for side in (64, 256):
        plan = make_plan(lora_training.settings(tmp_path, width=side, height=side))
        peaks.append({stage.name: stage.peak for stage in plan.forecast.stages})
    assert peaks[1].pop("sample") > 4 * peaks[0].pop("sample")
    assert peaks[0] == peaks[1]


def test_checkpointing_and_streaming_are_used_only_as_memory_requires(tmp_path, monkeypatch):
    """The fastest way that fits: first neither, then activations computed twice, then streamed blocks."""
    from flux.lora import forecast

    plan = make_plan(lora_training.settings(tmp_path, offload="auto", batch_size=64))
    training = read_training_set(plan.settings, plan.spec)
    found = []
    forecaster = Forecaster(
        plan.settings, plan.spec, plan.opened, plan.targets, training.largest, plan.device, plan.dtype
    )
    needed = [max(stage.needed for stage in forecaster.of(*way).stages) for way in ((False, 0), (True, 0))]
    monkeypatch.setattr(forecast.Stage, "needed", property(lambda stage: stage.weights + stage.activations))
    ways = [(False, 0), (True, 0), (True, 3)]
    for way in ways:
        enough = max(stage.peak for stage in forecaster.of(*way).stages)
        monkeypatch.setattr(forecast, "available", lambda device, enough=enough: enough)
        chosen, free = forecaster.fitting()
        found.append((chosen.checkpointing, chosen.streamed))
        assert free == enough
    assert found == ways
    assert needed[0] > needed[1]


def test_later_layers_need_less(tmp_path):
    """Activations are kept from the first trained layer on."""

    def activations(layers) -> int:
        plan = make_plan(lora_training.settings(tmp_path, layers=layers, checkpointing="off"))
        return next(stage.activations for stage in plan.forecast.stages if stage.name == "train")

    assert activations([3]) < activations([2]) < activations([0])


@pytest.mark.slow
def test_full_size_forecasts_are_those_of_the_page():
    """The table of docs/training-loras.md, computed without any file."""
    page = (Path(__file__).parents[2] / "docs" / "training-loras.md").read_text(encoding="utf-8")
    spec, sources = configs["flux-dev"], full_size.sources("flux-dev")
    opened = SimpleNamespace(
        transformer=SimpleNamespace(sources=sources["transformer"]),
        sources=lambda: sources,
        ranks_beside=dict,
    )
    for side in (512, 1024):
        for name, layers in {"vital layers": VITAL_LAYERS_DEV, "all layers": range(57)}.items():
            targets = find_targets(spec.params, layers, ("attention", "mlp"), 16, None)
            cells = []
            for quantize, streamed in (("none", 0), ("8bit", 0), ("4bit", 0), ("8bit", 57)):
                fields = {"model": "flux-dev", "images": "x", "quantize": quantize, "device": "cpu"}
                forecaster = Forecaster(
                    resolve(check_settings(TrainSettings, fields)), spec, opened, targets,
                    Example(Path("a"), "", side, side), torch.device("cpu"), torch.bfloat16,
                )  # fmt: skip
                stages = forecaster.of(checkpointing=True, streamed=streamed).stages
                cells.append(next(stage.peak for stage in stages if stage.name == "train") / GIB)
            line = f"| {side} x {side}, {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |"
            assert line in page


def test_the_forecast_in_one_line():
    from flux.lora.forecast import Forecast, Stage

    stages = (Stage("encode images", 2**30, 0), Stage("train", 2**30, 2**29))
    line = Forecast(stages, 3, True, 1234567, 2.0).line(7200, 24 * 2**30)
    assert line == (
        "forecast: 1,234,567 trained numbers, at most 1.50 of 24.0 GiB (to train), about 4 hours for 7200 "
        "steps: activations are computed twice, 3 blocks are streamed"
    )
