"""Estimates of memory: bytes counted before anything is loaded are those that are then allocated."""

import json
from pathlib import Path

import pytest
import torch
from helpers import full_size, lora_files, tiny_models, weight_files
from torch import nn

from flux.loaded_model import LoadedModel
from flux.runtime.activations import live_bytes
from flux.runtime.estimate import MemoryEstimator
from flux.runtime.plan import GIB, Plan
from flux.scan.skipper import LayerSkipper, SkipTask
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings, SkipSettings
from flux.specs import NANO_FOLDER
from flux.weights.find import find_model
from flux.weights.load import read_weights

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "h200.json"


@pytest.fixture(scope="module")
def dev() -> MemoryEstimator:
    return full_size.estimator()


def counted_and_loaded(**fields) -> tuple[MemoryEstimator, LoadedModel]:
    settings = resolve(ModelSettings(device="cpu", dtype="float32", **fields))
    model = find_model(settings)
    dtype = torch.float32
    estimate = MemoryEstimator(
        settings, model.spec, model.sources(), dtype, dtype, False, model.ranks_beside()
    )
    return estimate, LoadedModel.load(settings)


def bytes_of(model: nn.Module) -> int:
    return sum(x.nbytes for x in {id(x): x for x in (*model.parameters(), *model.buffers())}.values())


def test_passes_that_are_recorded_hold_their_memory():
    """On a GPU, where blocks are compiled: passes of few tokens, and the keys and values of sparse steps."""

    def held(side: int, **fields) -> int:
        fields |= {"width": side, "height": side}
        assert full_size.estimator(**fields).recorded == 0
        return full_size.estimator(compile=True, **fields).recorded

    assert held(1024) == 0
    tokens, streams = 32 * 32 + 512, 2 * 3072  # bytes of a token in one stream
    assert held(512) == pytest.approx(45.6 * tokens * streams, rel=0.02)
    kv = 2 * 57 * 64 * 64 * streams
    edits = {"prompt": "a dog", "edits": ["a cat"]}
    assert held(1024, **edits) == pytest.approx(1.423 * kv, rel=0.01)
    assert held(1024, **edits, sparse=False) == 0


def test_recorded_passes_stay_while_images_are_decoded():
    """Where weights are offloaded, no pass is recorded."""
    estimate = full_size.estimator(compile=True, width=512, height=512)
    stays, goes = (Plan.of(estimate, offload)["decode"].activations for offload in ("none", "model"))
    assert stays - goes == estimate.recorded > 0


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit", "fp8"])
@pytest.mark.parametrize("t5", ["same", "8bit"])
def test_weights_need_the_counted_bytes(quantize, t5):
    estimate, pipe = counted_and_loaded(quantize=quantize, t5=t5)
    models = {"transformer": pipe.model, "t5": pipe.t5, "clip": pipe.clip, "ae": pipe.ae}
    loaded = {name: bytes_of(model) for name, model in models.items()}
    counted = {
        "transformer": estimate.transformer.total,
        "t5": estimate.t5.total,
        "clip": estimate.clip,
        "ae": estimate.autoencoder,
    }
    # The scales of 8-bit floats and the encoders' position ids are not counted.
    assert counted == pytest.approx(loaded, rel=2e-4)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """flux-nano's transformer."""
    return read_weights(NANO_FOLDER / "transformer.safetensors", "cpu", torch.float32)


@pytest.fixture(scope="module")
def packed(weights, tmp_path_factory) -> Path:
    """The same in four bits."""
    file = tmp_path_factory.mktemp("packed") / "m.gguf"
    weight_files.save_gguf(weights, file, "Q4_0", pack=lambda name, x: x.ndim == 2 and x.shape[1] % 32 == 0)
    return file


@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("form", ["LoRA", "DoRA"])
def test_loras_over_packed_weights_need_the_counted_bytes(weights, packed, tmp_path, quantize, form):
    """A LoRA's branch is small; what a DoRA changes is expanded, and quantised where blocks are."""
    modules = ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.2.linear1")
    lora = lora_files.file_of(lora_files.pairs(weights, modules, rank=16), lambda module: module)
    if form == "DoRA":
        lora |= {f"{m}.dora_scale": torch.ones(len(weights[f"{m}.weight"]), 1) for m in modules}
    file = weight_files.save(lora, tmp_path / "lora.safetensors")
    given = {"weights": str(packed), "quantize": quantize}
    plain, _ = counted_and_loaded(**given)
    estimate, pipe = counted_and_loaded(**given, lora=[str(file)])
    assert estimate.transformer.total == pytest.approx(bytes_of(pipe.model), rel=2e-4)
    assert estimate.transformer.total > plain.transformer.total * 1.005


def test_live_bytes_are_those_alive_at_the_same_time():
    x = torch.empty(1000, device="meta")

    def run():
        a = x + 1  # 4000 bytes, like every tensor here
        b = a * 2
        del a
        c = b.view(10, 100).clone()
        return c + 1

    assert live_bytes(run, [x]) == 3 * 4000
    assert live_bytes(lambda: x.view(10, 100), [x]) == 0, "known tensors and views are not counted"


def test_the_meta_device_counts_like_a_cpu():
    """The same operations make tensors of the same sizes on both."""
    counts = []
    for device in ("cpu", "meta"):
        model = tiny_models.flux().to(device)
        inputs = {name: x.to(device) for name, x in tiny_models.inputs(1).items()}
        known = [*model.parameters(), *inputs.values()]
        counts.append(live_bytes(lambda: model(**inputs), known))  # noqa: B023  (called at once)
    assert counts[1] == pytest.approx(counts[0], 0.02)


def test_the_measured_peaks_of_an_h200(dev):
    """Estimates agree with benchmarks/results/h200.json.

    That benchmark also held diffusers' autoencoder (160 MiB), its copy of one modulation (36 MiB) and the
    workspace, which are subtracted.
    """
    results = json.loads(RESULTS.read_text())
    beside = results["loaded_gib"] + (160 + 36 + 32) / 1024
    for name, size in (("1024x1024", (1024, 1024)), ("1080x720 (1072x720)", (1072, 720))):
        # Modulations were computed step by step then.
        estimate = full_size.estimator(width=size[0], height=size[1], num_steps=1)
        measured = results["steps"][f"ours, eager, {name}"]
        assert estimate.denoise / GIB == pytest.approx(measured["peak_steps_gib"] - beside, rel=0.1)
    # Only 1072x720: at 1024x1024 the autoencoder stored its whole attention matrix when this was measured.
    assert estimate.decode[False] / GIB == pytest.approx(measured["peak_gib"] - beside, rel=0.1)


def test_known_sizes(dev):
    assert dev.transformer.total == 2 * 11_901_408_320
    assert dev.autoencoder == 2 * 83_819_683
    assert dev.t5.total == pytest.approx(4_994_582_224 + 4_530_066_360, rel=1e-3)
    assert dev.clip == pytest.approx(246_144_352, rel=1e-3)
    assert len(dev.transformer.blocks) == 57
    assert len(dev.t5.blocks) == 24


def test_streaming_keeps_two_buffers(dev):
    double, single = dev.transformer.blocks[0], dev.transformer.blocks[-1]
    assert dev.transformer.on_device(57) == dev.transformer.rest + 2 * double
    assert dev.transformer.on_device(0) == dev.transformer.total
    half = dev.transformer.on_device(28)
    assert dev.transformer.on_device(57) < half < dev.transformer.total
    assert single < double


def test_sparse_edits_keep_the_kv_of_all_layers(dev):
    """Keys and values of 4096 tokens in 57 layers, in bfloat16, instead of those of the vital layers."""
    fields = {"edits": ["a cat"], "prompt": "a dog", "vital_layers": [1, 2]}
    sparse, whole = (full_size.estimator(**fields, sparse=sparse).denoise for sparse in (True, False))
    assert sparse - whole == (57 - 2) * 2 * 4096 * 3072 * 2


def test_an_edit_keeps_the_kv_of_its_vital_layers(dev):
    edit = full_size.estimator(prompt="a dog", edits=["a cat"], mask="none")
    assert edit.denoise - dev.denoise == 10 * 2 * 4096 * 3072 * 2
    fields = {"mask": "none", "vital_layers": [1, 2], "true_cfg": 2.0}
    more = full_size.estimator(prompt="a dog", edits=["a cat"], **fields)
    assert more.denoise - dev.denoise == 2 * 2 * 2 * 4096 * 3072 * 2
    with_queries = full_size.estimator(prompt="a dog", edits=["a cat"], **fields, parts="qkv")
    assert with_queries.denoise - more.denoise == 2 * 2 * 4096 * 3072 * 2


def test_a_search_for_the_mask_keeps_queries_and_keys(dev):
    """It keeps all tokens of four layers, of the edit and of its source."""
    with_search, without = (
        full_size.estimator(prompt="a dog", edits=["a cat"], mask=mask, sparse=False)
        for mask in ("auto", "none")
    )
    assert with_search.denoise - without.denoise == 2 * 4 * 2 * (4096 + 512) * 3072 * 2


def test_a_sweep_keeps_the_streams_into_each_layer(nano):
    """If all models fit, it also decodes while it denoises the next images."""
    settings = {"prompts": ["a dog"], "width": 64, "height": 96, "true_cfg": 2.0}
    settings = resolve(SkipSettings(**settings, device="cpu", dtype="float32"))
    opened, dtype = find_model(settings), torch.float32
    estimate = MemoryEstimator(settings, opened.spec, opened.sources(), dtype, dtype, on_gpu=False)
    skipper = LayerSkipper(settings, nano)
    skipper.make(SkipTask(0, "a dog", 0, ((),)))
    kept = [x for passes in skipper.reference.streams for each in passes for x in (each.img, each.txt)]
    assert estimate.streams == sum(x.nbytes for x in kept)
    none, model = (Plan.of(estimate, offload)["denoise"].activations for offload in ("none", "model"))
    assert model == estimate.denoise + estimate.streams
    assert none - model == estimate.decode[False]


def test_larger_runs_need_more(dev):
    assert full_size.estimator(batch_size=3).denoise > 2.5 * dev.denoise
    large = full_size.estimator(width=2048, height=2048)
    assert large.denoise > 3 * dev.denoise
    assert large.decode[False] > 3.9 * dev.decode[False]
    assert large.decode[True] < dev.decode[False]
    for bits, weights in (("8bit", 0.51), ("4bit", 0.29)):
        assert full_size.estimator(quantize=bits).transformer.total < weights * dev.transformer.total
