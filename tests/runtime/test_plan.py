"""The plan: bytes counted before anything is loaded are those that are then there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from torch import nn

from flux.errors import InputError
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.pipeline import Pipeline
from flux.runtime import plan
from flux.runtime.estimate import MemoryEstimator, live_bytes
from flux.runtime.plan import (
    GIB,
    MIB,
    Plan,
    Stage,
    describe,
    free_memory,
    make_plan,
    sources_of,
)
from flux.scan.sweep import Bypasser, Task
from flux.settings.complete import resolve
from flux.settings.demos import EditSettings, ModelSettings, SkipSettings
from flux.specs import configs
from flux.weights.headers import StoredTensor
from flux.weights.find import files_of
from flux.weights.layouts import TensorSource
from flux.weights.load import on_meta
from flux.weights.scales import ScaledTensor

CPU, BF16 = torch.device("cpu"), torch.bfloat16
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200.json"


def plain(net: nn.Module) -> dict[str, TensorSource]:
    """As if a file held the net's tensors as they are."""
    return {
        name: TensorSource((ScaledTensor(StoredTensor(Path("x"), "BF16", tuple(x.shape), 0, 2 * x.numel())),))
        for name, x in net.named_parameters()
    }


def full_size(**fields) -> MemoryEstimator:
    """FLUX.1-dev with T5-XXL and CLIP-L, without a file."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    spec = configs["flux-dev"]
    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    clip = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    made = {
        "transformer": plain(on_meta(Flux, spec.params)),
        "vae": plain(on_meta(AutoEncoder, spec.ae_params)),
        "text_encoder": plain(on_meta(CLIPTextModel, clip)),
        "text_encoder_2": plain(on_meta(T5EncoderModel, t5)),
    }
    kind = EditSettings if "edits" in fields else ModelSettings
    return MemoryEstimator(resolve(kind(model="flux-dev", **fields)), spec, made, BF16, BF16, on_gpu=True)


@pytest.fixture(scope="module")
def dev() -> MemoryEstimator:
    return full_size()


def counted_and_loaded(**fields) -> tuple[MemoryEstimator, Pipeline]:
    settings = resolve(ModelSettings(device="cpu", dtype="float32", **fields))
    spec, files = configs["flux-nano"], files_of(settings)
    estimate = MemoryEstimator(
        settings, spec, sources_of(spec, files), torch.float32, torch.float32, on_gpu=False
    )
    return estimate, Pipeline.load(settings)


def bytes_of(net: nn.Module) -> int:
    return sum(x.nbytes for x in {id(x): x for x in (*net.parameters(), *net.buffers())}.values())


# ---- counting


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit", "fp8"])
@pytest.mark.parametrize("t5", ["same", "8bit"])
def test_weights_take_what_was_counted(quantize, t5):
    estimate, pipe = counted_and_loaded(quantize=quantize, t5=t5)
    nets = {"flow": pipe.model, "t5": pipe.t5, "clip": pipe.clip, "ae": pipe.ae}
    found = {name: bytes_of(net) for name, net in nets.items()}
    counted = {
        "flow": estimate.transformer.total,
        "t5": estimate.t5.total,
        "clip": estimate.clip,
        "ae": estimate.autoencoder,
    }
    # A scale of 8-bit floats and the encoders' positions are not counted.
    assert counted == pytest.approx(found, rel=2e-4)


def test_what_lives_at_the_same_time():
    x = torch.empty(1000, device="meta")

    def run():
        a = x + 1  # 4000 bytes, like each of these
        b = a * 2
        del a
        c = b.view(10, 100).clone()
        return c + 1

    assert live_bytes(run, [x]) == 3 * 4000
    assert live_bytes(lambda: x.view(10, 100), [x]) == 0, "what was there before, and views, are nothing new"


def test_the_meta_device_tells_what_a_cpu_would():
    """The same operations make tensors of the same sizes on both."""
    net, given = tiny_models.flux(), tiny_models.inputs(1)
    counted = live_bytes(lambda: net(**given), [*net.parameters(), *given.values()])
    net.to("meta")
    given = {name: x.to("meta") for name, x in given.items()}
    assert live_bytes(lambda: net(**given), [*net.parameters(), *given.values()]) == pytest.approx(
        counted, 0.02
    )


def test_the_measured_peaks_of_an_h200(dev):
    """benchmarks/results/h200.json, of which what lay beside the model then is taken off: diffusers' own
    autoencoder (160 MiB), its copy of one modulation (36 MiB), and the workspace.
    """
    results = json.loads(RESULTS.read_text())
    beside = results["loaded_gib"] + (160 + 36 + 32) / 1024
    for name, size in (("1024x1024", (1024, 1024)), ("1080x720 (1072x720)", (1072, 720))):
        # Modulations were made step by step then.
        estimate = full_size(width=size[0], height=size[1], num_steps=1)
        measured = results["steps"][f"ours, eager, {name}"]
        assert estimate.denoise / GIB == pytest.approx(measured["peak_steps_gib"] - beside, rel=0.1)
    # At 1024x1024 the autoencoder's attention was stored whole when that was measured.
    assert estimate.decode[False] / GIB == pytest.approx(measured["peak_gib"] - beside, rel=0.1)


def test_sizes_that_are_known(dev):
    assert dev.transformer.total == 2 * 11_901_408_320
    assert dev.autoencoder == 2 * 83_819_683
    assert dev.t5.total == pytest.approx(4_994_582_224 + 4_530_066_360, rel=1e-3)
    assert dev.clip == pytest.approx(246_144_352, rel=1e-3)
    assert len(dev.transformer.blocks) == 57
    assert len(dev.t5.blocks) == 24


def test_what_is_streamed_leaves_room_for_two(dev):
    double, single = dev.transformer.blocks[0], dev.transformer.blocks[-1]
    assert dev.transformer.on_device(57) == dev.transformer.rest + 2 * double
    assert dev.transformer.on_device(0) == dev.transformer.total
    half = dev.transformer.on_device(28)
    assert dev.transformer.on_device(57) < half < dev.transformer.total
    assert single < double


def test_an_edit_holds_keys_and_values(dev):
    edit = full_size(prompt="a dog", edits=["a cat"], mask="none")
    assert edit.denoise - dev.denoise == 10 * 2 * 4096 * 3072 * 2
    more = full_size(prompt="a dog", edits=["a cat"], mask="none", vital_layers=[1, 2], true_cfg=2.0)
    assert more.denoise - dev.denoise == 2 * 2 * 2 * 4096 * 3072 * 2


def test_a_search_for_the_mask_holds_queries_and_keys(dev):
    """Of all tokens in four layers, of the edit and of its source."""
    edit, without = (full_size(prompt="a dog", edits=["a cat"], mask=mask) for mask in ("auto", "none"))
    assert edit.denoise - without.denoise == 2 * 4 * 2 * (4096 + 512) * 3072 * 2


def test_a_sweep_holds_what_enters_each_layer(nano):
    """And decodes beside its steps, where there is room for all nets."""
    settings = {"prompts": ["a dog"], "width": 64, "height": 96, "true_cfg": 2.0}
    settings = resolve(SkipSettings(**settings, device="cpu", dtype="float32"))
    spec, files, F32 = configs["flux-nano"], files_of(settings), torch.float32
    estimate = MemoryEstimator(settings, spec, sources_of(spec, files), F32, F32, on_gpu=False)
    bypasser = Bypasser(nano, settings)
    bypasser.make(Task(0, "a dog", 0, ((),)))
    held = [x for passes in bypasser._streams for each in passes for x in (each.img, each.txt)]
    assert estimate.streams == sum(x.nbytes for x in held)
    beside = {plan: Plan.of(estimate, plan)["denoise"].activations for plan in ("none", "model")}
    assert beside["model"] == estimate.denoise + estimate.streams
    assert beside["none"] - beside["model"] == estimate.decode[False]


def test_more_takes_more(dev):
    assert full_size(batch_size=3).denoise > 2.5 * dev.denoise
    large = full_size(width=2048, height=2048)
    assert large.denoise > 3 * dev.denoise
    assert large.decode[False] > 3.9 * dev.decode[False]
    assert large.decode[True] < dev.decode[False]
    for bits, weights in (("8bit", 0.51), ("4bit", 0.29)):
        assert full_size(quantize=bits).transformer.total < weights * dev.transformer.total


# ---- choosing


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
def test_what_auto_picks_for_a_card(dev, gib, offload, streamed, t5):
    """`streamed` at least, and no more than it takes."""
    plan = Plan.fitting(dev, gib * GIB)
    assert (plan.offload, plan.streamed_t5, plan.tiled) == (offload, t5, False)
    assert plan.streamed >= streamed
    assert plan.fits(gib * GIB)
    if plan.streamed:
        fewer = Plan.of(dev, "blocks", plan.streamed - 1, t5)
        assert not fewer["denoise"].fits(gib * GIB)


def test_auto_tiles_only_where_it_must():
    large = full_size(width=2048, height=2048)
    assert not Plan.fitting(large, 24 * GIB).tiled
    assert Plan.fitting(large, 8 * GIB).tiled
    assert Plan.fitting(full_size(tiled=True), 80 * GIB).tiled


def test_quantised_weights_stay_where_they_fit():
    assert Plan.fitting(full_size(quantize="8bit"), 16 * GIB).offload == "model"
    plan = Plan.fitting(full_size(quantize="4bit"), 9 * GIB)
    assert plan.streamed == 0
    assert plan.streamed_t5 == 24, "T5 alone is too large then"
    assert Plan.fitting(full_size(quantize="4bit", t5="8bit"), 9 * GIB).offload == "model"
    assert Plan.fitting(full_size(quantize="4bit", t5="cpu"), 12 * GIB).offload == "none"


def test_too_little_memory_is_told_before_anything_loads(dev):
    with pytest.raises(
        InputError, match=r"Got 2\.0 GiB of free memory .* expected \d\.\d .*1024x1024"
    ) as error:
        Plan.fitting(dev, 2 * GIB)
    assert "\n" not in str(error.value)


def test_the_plan_in_a_line(dev):
    line = describe(Plan.fitting(dev, 8 * GIB), dev, 8 * GIB)
    assert "transformer blocks are streamed" in line
    assert "T5's blocks" in line
    assert "of 8.0 GiB" in line
    assert "all models stay on the device" in describe(Plan.of(dev, "none"), dev, None)


def test_a_stage_fits_with_a_margin():
    stage = Stage("denoise", GIB, 100 * MIB)
    assert stage.peak == GIB + 100 * MIB
    beside = round(plan.WEIGHT_MARGIN * GIB) + 116 * MIB
    assert not stage.fits(stage.peak)
    assert stage.fits(beside + plan.SLACK)


@pytest.mark.parametrize(
    ("offload", "expected"),
    [("none", Plan("none", 0, 0, False)), ("model", Plan("model", 0, 0, False)),
     ("blocks", Plan("blocks", plan.ALL_BLOCKS, plan.ALL_BLOCKS, False))],
)  # fmt: skip
def test_a_plan_that_is_named_is_not_worked_out(offload, expected):
    settings = resolve(ModelSettings(offload=offload))
    assert make_plan(settings, None, None, BF16, BF16, CPU) == expected


def test_auto_says_what_it_picked(capsys):
    settings = resolve(ModelSettings(device="cpu", offload="auto"))
    spec = configs["flux-nano"]
    plan = make_plan(settings, spec, files_of(settings), torch.float32, torch.float32, CPU)
    assert plan.offload == "none"
    assert plan.peak < GIB
    assert capsys.readouterr().out.startswith("memory: all models stay on the device; at most 0.2 GiB")


def test_free_memory_of_a_card_without_a_number(monkeypatch):
    """What others leave, beside what this process has reserved itself, and no more than it is allowed."""
    from torch.cuda._utils import _get_device_index

    def fraction(device: int | None = None) -> float:
        return 0.5 if device is None else _get_device_index(device) * 0.5

    cuda = {"mem_get_info": (20, 100), "memory_allocated": 10, "memory_reserved": 40}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", fraction)
    assert free_memory(torch.device("cuda")) == 40, "of 60, only 50 allowed, and 10 taken"


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "model", "blocks"])
@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_the_peak_is_as_planned(offload, quantize):
    """A transformer of full width with seven blocks, a T5 of full width with four."""
    from benchmarks.memory import CLIP_L, T5_XXL, Nets

    device, spec = torch.device("cuda"), configs["flux-dev"]
    spec = replace(spec, params=replace(spec.params, depth=1, depth_single_blocks=6))
    nets = Nets(spec, device, BF16, {**T5_XXL, "num_layers": 4}, CLIP_L)
    settings = resolve(ModelSettings(model="flux-dev", offload=offload, quantize=quantize))
    estimate = MemoryEstimator(settings, spec, nets.made, BF16, BF16, on_gpu=True)
    plan = Plan.of(estimate, offload, *((7, 4) if offload == "blocks" else (0, 0)))
    pipe = nets.pipeline(settings, plan, device)
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
def test_auto_plans_for_the_card_that_is_there(capsys):
    pipe = Pipeline.load(resolve(ModelSettings(device="auto", offload="auto")))
    assert pipe.device.type == "cuda"
    assert not pipe.offloaded
    assert re.match(
        r"memory: all models stay on the device; at most 0\.\d of \d+\.\d GiB", capsys.readouterr().out
    )
