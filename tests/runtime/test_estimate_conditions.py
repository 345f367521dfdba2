"""Estimates of runs that images steer: wider inputs, context tokens, text tokens of Redux."""

import pytest
import torch
from helpers import full_size, tiny_models

from flux.conditions.kontext import PREFERED_KONTEXT_RESOLUTIONS
from flux.errors import InputError
from flux.inputs import Condition, Inputs
from flux.runtime import plan
from flux.runtime.activations import live_bytes
from flux.runtime.estimate import DEPTH_BYTES, steering_tokens
from flux.runtime.plan import GIB, Plan, check_size, operations
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.specs import configs


@pytest.fixture(scope="module")
def dev():
    return full_size.estimator()


def tokens(model: str, **fields) -> tuple[int, int]:
    return steering_tokens(GenerateSettings(model=model, prompts=["a dog"], **fields), configs[model])


def test_tokens_that_images_add():
    largest = max(width * height // 256 for width, height in PREFERED_KONTEXT_RESOLUTIONS)
    assert tokens("flux-dev") == (0, 0)
    assert tokens("flux-dev-kontext") == (largest, 0), "it may get an image later, in the studio"
    assert tokens("flux-dev-kontext", context=["a.png", "b.png"]) == (2 * largest, 0)
    assert tokens("flux-dev", redux=["a.png", "b.png"]) == (0, 2 * 729)
    assert tokens("flux-dev-redux") == (0, 729)
    plain = ModelSettings(model="flux-dev-kontext")
    assert steering_tokens(plain, configs["flux-dev-kontext"]) == (largest, 0)


@pytest.mark.parametrize(("tool", "columns", "num_txt"), [("fill", 320, 128), ("canny", 64, 512)])
def test_wider_inputs_are_a_few_columns(dev, tool, columns, num_txt):
    tool_estimate = full_size.estimator(f"flux-dev-{tool}")
    assert tool_estimate.transformer.total - dev.transformer.total == 2 * 3072 * columns
    ratio = (4096 + num_txt) / (4096 + 512)
    assert tool_estimate.denoise / dev.denoise == pytest.approx(ratio, rel=0.02)


def test_kontext_counts_context_tokens(dev):
    """Activations grow with the tokens: here 4096 noise, 512 text and 4150 context tokens."""
    kontext = full_size.estimator("flux-dev-kontext", num_steps=50)
    ratio = (4096 + 512 + 4150) / (4096 + 512)
    assert kontext.denoise / dev.denoise == pytest.approx(ratio, rel=0.1)
    two = full_size.estimator("flux-dev-kontext", prompts=["x"], context=["a.png", "b.png"], num_steps=50)
    ratio_of_two = (4096 + 512 + 2 * 4150) / (4096 + 512 + 4150)
    assert two.denoise / kontext.denoise == pytest.approx(ratio_of_two, rel=0.05)
    assert kontext.streams / dev.streams == pytest.approx(ratio)
    small = full_size.estimator("flux-dev-kontext", width=256, height=256)
    assert small.decode[False] > 10 * full_size.estimator(width=256, height=256).decode[False], (
        "the context image is encoded in its own size"
    )


def test_kept_context_is_counted(dev):
    """Keys and values of all layers: of each row of both passes, of a reference and of each of its edits."""
    kv = 57 * 2 * 4150 * 3072 * 2  # bytes of one row
    assert round(kv / GIB, 1) == 2.7, "the page on memory"
    fields = {"prompts": ["x"], "context": ["a.png"], "num_steps": 50}

    def kept(**more) -> float:
        settings = fields | more
        every, once = (
            full_size.estimator("flux-dev-kontext", **settings, context_every=n).denoise for n in (1, 2)
        )
        return (once - every) / kv

    assert kept() == pytest.approx(1, rel=0.1)
    assert kept(batch_size=3) == pytest.approx(3, rel=0.1)
    assert kept(true_cfg=2.0) == pytest.approx(2, rel=0.1)
    edits = {"prompt": "x", "edits": ["a", "b", {"prompt": "c", "then": ["d"]}], "vital_layers": [0]}
    fields = edits | {"context": ["a.png"], "num_steps": 50}
    assert kept() == pytest.approx(1 + 4, rel=0.1)


def test_redux_counts_text_tokens(dev):
    redux = full_size.estimator("flux-dev-redux")
    assert redux.denoise / dev.denoise == pytest.approx((4096 + 512 + 729) / (4096 + 512), rel=0.03)
    assert redux.text == dev.text, "T5 encodes the prompt alone"


def test_the_table_of_the_page_on_memory(dev):
    """Activations in GiB, and the operations of a step beside those of dev."""
    kontext, redux = (full_size.estimator(f"flux-dev-{name}", num_steps=50) for name in ("kontext", "redux"))
    more = [(estimate.denoise - dev.denoise) / GIB for estimate in (kontext, redux)]
    assert [round(gib, 1) for gib in (dev.denoise / GIB, *more)] == [0.7, 0.6, 0.1]
    plain, *steps = (operations(configs["flux-dev"], 4096 + 512 + count) for count in (0, 4150, 729))
    assert [round(step / plain, 1) for step in steps] == [2.2, 1.2]


def test_the_model_of_depth_is_beside_the_autoencoder():
    depth, canny = (full_size.estimator(f"flux-dev-{name}") for name in ("depth", "canny"))
    assert depth.decode[True] - canny.decode[True] == pytest.approx(DEPTH_BYTES, rel=0.1)


def test_a_plan_for_kontext_streams_more(dev):
    """The same GPU, more activations."""
    kontext = full_size.estimator("flux-dev-kontext")
    streamed = {
        gib: [Plan.fitting(estimate, gib * GIB).streamed for estimate in (dev, kontext)]
        for gib in (8, 12, 14, 18)
    }
    assert all(plain < more for plain, more in streamed.values())


def test_the_estimate_is_that_of_a_real_pass():
    """The same operations on the CPU make tensors of the counted sizes."""
    model, given = tiny_models.flux(), tiny_models.inputs(1)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 12, 64, generator=generator)
    inputs = Inputs(**given, condition=Condition(context=context, context_ids=torch.ones(1, 12, 3)))
    known = [*(x for x in given.values() if x is not None), context]

    def count(device: str) -> int:
        net = model.to(device)
        condition = inputs.condition.map(lambda x: x.to(device))
        moved = Inputs(**{name: x.to(device) for name, x in given.items()}, condition=condition)
        return live_bytes(lambda: net.observe(moved), [*net.parameters(), *known])

    assert count("cpu") == count("meta") > 0


def test_a_size_beyond_the_memory_counts_the_context(monkeypatch):
    spec = configs["flux-dev-kontext"]
    block = 4096 * 3072 * 8 * 2
    monkeypatch.setattr(plan, "total_memory", lambda device: int(1.5 * block))
    fields = {"width": 1024, "height": 1024, "tiled": True}
    arguments = torch.bfloat16, torch.device("cpu")
    check_size(ModelSettings(model="flux-dev", **fields), configs["flux-dev"], *arguments)
    with pytest.raises(InputError, match="needs more than"):
        check_size(ModelSettings(model="flux-dev-kontext", **fields), spec, *arguments)
