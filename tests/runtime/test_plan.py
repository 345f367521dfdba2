"""Plans: the fastest one that fits."""

import re
from dataclasses import replace
from itertools import count

import pytest
import torch
from helpers import full_size
from torch.utils.flop_counter import FlopCounterMode

from flux.errors import InputError, InputWarning
from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.runtime import plan
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import (
    GIB,
    MIB,
    Plan,
    Stage,
    check_size,
    describe_plan,
    free_memory,
    make_plan,
    warn_of_slow_steps,
)
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import configs
from flux.weights.find import find_model

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module")
def dev() -> MemoryEstimator:
    return full_size.estimator()


@pytest.mark.parametrize(
    ("gib", "offload", "streamed", "t5"),
    [
        (80, "none", 0, 0),
        (28, "model", 0, 0),
        (24, "blocks", 3, 0),
        (16, "blocks", 20, 0),
        (12, "blocks", 30, 0),
        (8, "blocks", 40, 24),
    ],
)
def test_auto_plans_for_common_gpus(dev, gib, offload, streamed, t5):
    """It streams at least `streamed` blocks, and no more than needed."""
    plan = Plan.fitting(dev, gib * GIB)
    assert (plan.offload, plan.streamed_t5, plan.tiled) == (offload, t5, False)
    assert plan.streamed >= streamed
    assert plan.fits(gib * GIB)
    if plan.streamed:
        fewer = Plan.of(dev, "blocks", plan.streamed - 1, t5)
        assert not fewer["denoise"].fits(gib * GIB)


def test_auto_tiles_only_if_needed():
    large = full_size.estimator(width=2048, height=2048)
    assert not Plan.fitting(large, 24 * GIB).tiled
    assert Plan.fitting(large, 8 * GIB).tiled
    assert Plan.fitting(full_size.estimator(tiled=True), 80 * GIB).tiled


def test_quantised_weights_stay_on_the_device_if_they_fit():
    assert Plan.fitting(full_size.estimator(quantize="8bit"), 16 * GIB).offload == "model"
    plan = Plan.fitting(full_size.estimator(quantize="4bit"), 9 * GIB)
    assert plan.streamed == 0
    assert plan.streamed_t5 == 24, "T5 alone is too large"
    assert Plan.fitting(full_size.estimator(quantize="4bit", t5="8bit"), 9 * GIB).offload == "model"
    assert Plan.fitting(full_size.estimator(quantize="4bit", t5="cpu"), 12 * GIB).offload == "none"


def test_too_little_memory_is_an_error_before_anything_loads(dev):
    with pytest.raises(
        InputError, match=r"Got 2\.0 GiB of free memory .* expected \d\.\d .*1024x1024"
    ) as error:
        Plan.fitting(dev, 2 * GIB)
    assert "\n" not in str(error.value)


def test_a_plan_is_described_in_one_line(dev):
    line = describe_plan(Plan.fitting(dev, 8 * GIB), dev, 8 * GIB)
    assert "transformer blocks are streamed" in line
    assert "T5's blocks" in line
    assert "of 8.0 GiB" in line
    assert "all models stay on the device" in describe_plan(Plan.of(dev, "none"), dev, None)


def test_a_stage_fits_with_a_margin():
    stage = Stage("denoise", GIB, 100 * MIB)
    assert stage.peak == GIB + 100 * MIB
    with_margins = round(plan.WEIGHT_MARGIN * GIB) + 116 * MIB
    assert not stage.fits(stage.peak)
    assert stage.fits(with_margins + plan.SLACK)


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        ("none", Plan("none", 0, 0, False)),
        ("model", Plan("model", 0, 0, False)),
        ("blocks", Plan("blocks", plan.ALL_BLOCKS, plan.ALL_BLOCKS, False)),
    ],
)
def test_a_named_plan_needs_no_estimate(offload, expected):
    settings = resolve(ModelSettings(offload=offload))
    assert make_plan(settings, find_model(settings), BF16, BF16, CPU) == expected


def test_auto_prints_its_plan(capsys):
    settings = resolve(ModelSettings(device="cpu", offload="auto"))
    plan = make_plan(settings, find_model(settings), torch.float32, torch.float32, CPU)
    assert plan.offload == "none"
    assert plan.peak < GIB
    assert capsys.readouterr().out.startswith("memory: all models stay on the device; at most 0.2 GiB")


def test_free_memory_of_a_gpu_without_an_index(monkeypatch):
    """It is free or reserved by this process, within its allowed share."""
    from torch.cuda._utils import _get_device_index

    def fraction(device: int | None = None) -> float:
        return 0.5 if device is None else _get_device_index(device) * 0.5

    cuda = {"mem_get_info": (20, 100), "memory_allocated": 10, "memory_reserved": 40}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    assert free_memory(torch.device("cuda")) == 40, "60 free or reserved, 50 allowed, 10 allocated"


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "blocks"])
@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_the_peak_is_as_planned(offload, quantize):
    """A transformer of full width with seven blocks, a T5 of full width with four."""
    from benchmarks.random_models import CLIP_L, T5_XXL, RandomModels

    device, spec = torch.device("cuda"), configs["flux-dev"]
    spec = replace(spec, params=replace(spec.params, depth=1, depth_single_blocks=6))
    models = RandomModels(spec, device, BF16, {**T5_XXL, "num_layers": 4}, CLIP_L)
    settings = resolve(ModelSettings(model="flux-dev", offload=offload, quantize=quantize))
    estimate = MemoryEstimator(settings, spec, models.sources, BF16, BF16, on_gpu=True)
    plan = Plan.of(estimate, offload, *((7, 4) if offload == "blocks" else (0, 0)))
    pipe = models.load(settings, plan)
    for stage, run in {
        "text": lambda: pipe.condition(["a dog"], 3.5),
        "all": lambda: pipe.generate(["a dog"], [0], width=1024, height=1024, num_steps=2, guidance=3.5),
    }.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        planned = plan.peak if stage == "all" else plan[stage].peak
        assert torch.cuda.max_memory_allocated() == pytest.approx(planned, rel=0.1)


@pytest.mark.gpu
def test_auto_plans_for_the_present_gpu(capsys):
    pipe = LoadedModel.load(resolve(ModelSettings(device="auto", offload="auto")))
    assert pipe.device.type == "cuda"
    assert not pipe.offloaded
    assert re.match(
        r"memory: all models stay on the device; at most 0\.\d of \d+\.\d GiB", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("fields", "gpus", "fits"),
    [
        ({"width": 1024, "height": 1024}, 1, True),
        ({"width": 8192, "height": 8192}, 1, False),
        ({"width": 8192, "height": 8192, "tiled": True}, 1, False),
        ({"width": 8192, "height": 8192, "tiled": True}, 8, True),
        ({"width": 8192, "height": 8192, "offload": "auto"}, 8, True),
        ({"batch_size": 64}, 1, True),
    ],
)
def test_sizes_that_no_plan_fits(monkeypatch, fields, gpus, fits):
    """The check is of what must be there at once. It refuses nothing that may run."""
    monkeypatch.setattr(plan, "total_memory", lambda device: 8 * GIB)
    settings = ModelSettings(model="flux-dev", **fields)
    if fits:
        check_size(settings, configs["flux-dev"], BF16, CPU, gpus)
        return
    with pytest.raises(InputError, match=r"needs more than .* GiB of memory, and cpu has 8: make the image"):
        check_size(settings, configs["flux-dev"], BF16, CPU, gpus)


def test_sizes_are_checked_before_files_are_looked_for(monkeypatch):
    monkeypatch.setattr(plan, "total_memory", lambda device: 2**20)
    monkeypatch.setattr("flux.loaded_model.find_model", lambda *_: pytest.fail("looked for files"))
    with pytest.raises(InputError, match="256x256"):
        LoadedModel.load(resolve(ModelSettings(device="cpu")))


# ---- the time of a step on a CPU


@pytest.fixture
def slow_cpu(monkeypatch):
    """Multiplies two matrices of 1024x1024 in a second."""
    ticks = count()
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))
    plan.operations_per_second.cache_clear()
    yield 2 * 1024**3  # operations a second
    plan.operations_per_second.cache_clear()


def operations_of_a_step(params, tokens: int, text: int) -> int:
    """PyTorch's own count of a pass through the transformer."""
    with torch.device("meta"):
        model, rows = Flux(params), {"img": tokens, "txt": text}
        ids = {name: torch.zeros(1, length, 3) for name, length in rows.items()}
        img, txt = torch.zeros(1, tokens, params.in_channels), torch.zeros(1, text, params.context_in_dim)
        vec, one = torch.zeros(1, params.vec_in_dim), torch.zeros(1)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(img, ids["img"], txt, ids["txt"], one, vec, one)
    return counter.get_total_flops()


def test_slow_steps_on_a_cpu_are_told_before(slow_cpu):
    """The estimate leaves out the text: it lies 0 to 20 % below PyTorch's count."""
    spec = configs["flux-nano"]
    settings = ModelSettings(width=1024, height=1024, num_steps=10)
    with pytest.warns(InputWarning) as told:
        warn_of_slow_steps(settings, spec, torch.float32, CPU)
    [message] = [str(each.message) for each in told]
    seconds = operations_of_a_step(spec.params, 4096, 40) / slow_cpu
    step, image = map(int, re.findall(r"about (\d+) minutes", message))
    assert message.startswith("On this CPU a step of 1024x1024 takes about ")
    assert 0.8 * seconds - 30 < 60 * step < seconds + 30
    assert 8 * seconds - 30 < 60 * image < 10 * seconds + 30


@pytest.mark.filterwarnings("error")
def test_other_steps_are_not_told(slow_cpu):
    spec = configs["flux-nano"]
    warn_of_slow_steps(ModelSettings(), spec, torch.float32, CPU)
    warn_of_slow_steps(ModelSettings(width=4096, height=4096), spec, torch.float32, torch.device("cuda"))
