"""The nodes' hooks over this package's own blocks give this package's own numbers, bit for bit."""

from dataclasses import replace

import pytest
import torch
from helpers import comfy_stand_in, tiny_models

from flux.intervention import Intervention
from flux.model import Inputs

LATENT = 8, 8  # height and width: 16 image tokens
TENSORS = "img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance"


@pytest.fixture
def nodes(monkeypatch):
    return comfy_stand_in.import_nodes(monkeypatch)


@pytest.fixture(scope="module")
def model():
    return tiny_models.flux()


def rows(count: int = 3, **changes) -> Inputs:
    """Inputs of several rows, all at the same noise level and from the same noise."""
    given = tiny_models.inputs(count, **changes)
    given["img"] = given["img"][:1].expand(count, -1, -1).contiguous()
    given["timesteps"] = torch.full((count,), 0.8)
    return Inputs(**given)


def expected(model, inputs: Inputs, layers, weight: float = 1.0) -> torch.Tensor:
    """The batch with the first row's kv injected in all rows, by this package's intervention."""
    _, recorded = model.observe(inputs, Intervention(keep=frozenset(layers)))
    kept = {}
    for layer in sorted(layers):
        # The first row injects its own, so its kv stay what they are without an edit.
        kept[layer] = tuple(x[:1] for x in recorded.kept[layer])
    weights = dict.fromkeys(layers, torch.tensor([[0.0]] + [[weight]] * (len(inputs.img) - 1)).expand(-1, 16))
    whole = Intervention(inject=kept, inject_weights=weights if weight != 1 else {})
    return model.observe(inputs, whole)[0]


def edited(nodes, patcher, layers, strength=1.0, start=0.0, end=1.0, **more):
    return nodes.StableFlowEdit.execute(patcher, layers, strength, start, end, **more).args[0]


@pytest.mark.parametrize("calls_attn1", [True, False], ids=["attn1_patch", "replaced blocks"])
@pytest.mark.parametrize("layers", [(0,), (2, 3), (0, 1, 2, 3, 4, 5, 6)])
def test_edit_is_this_packages_injection_bit_for_bit(nodes, model, layers, calls_attn1):
    inputs = rows()
    patcher = edited(nodes, comfy_stand_in.Patcher(model, calls_attn1), layers)
    velocity = patcher.run(inputs, 0.8, LATENT)
    assert torch.equal(velocity, expected(model, inputs, layers))
    assert not torch.equal(velocity[1:], model.observe(inputs)[0][1:])


def test_both_hooks_give_the_same_bits_at_half_strength(nodes, model):
    inputs = rows()
    by_patch, by_blocks = (
        edited(nodes, comfy_stand_in.Patcher(model, calls_attn1), (1, 4), 0.5).run(inputs, 0.8, LATENT)
        for calls_attn1 in (True, False)
    )
    assert torch.equal(by_patch, by_blocks)
    torch.testing.assert_close(by_patch, expected(model, inputs, (1, 4), 0.5), rtol=0, atol=2e-6)


def test_flux_nano_edits_as_this_package_does(nodes, nano):
    cond = nano.condition(["a dog on the grass", "a cat on the grass"], 3.5)
    noise = nano.noise([3], 256, 256).expand(2, -1, -1).contiguous()
    times = torch.full((2,), 0.9)
    inputs = Inputs(
        noise, nano.image_ids(2, 256, 256), cond.txt, cond.txt_ids, times, cond.vec, cond.guidance
    )
    layers = nano.spec.vital_layers
    velocity = edited(nodes, comfy_stand_in.Patcher(nano.model), layers).run(inputs, 0.9, (32, 32))
    assert torch.equal(velocity, expected(nano.model, inputs, layers))


def test_reference_is_untouched(nodes, model):
    inputs = rows()
    velocity = edited(nodes, comfy_stand_in.Patcher(model), (0, 3)).run(inputs, 0.8, LATENT)
    assert torch.equal(velocity[:1], model.observe(inputs)[0][:1])


def test_each_prompt_of_guidance_has_its_own_reference(nodes, model):
    positive, negative = rows(seed=1), rows(seed=2)
    pairs = {name: (getattr(positive, name), getattr(negative, name)) for name in TENSORS}
    both = Inputs(**{name: torch.cat(pair) for name, pair in pairs.items()})
    velocity = edited(nodes, comfy_stand_in.Patcher(model), (0, 3)).run(both, 0.8, LATENT, chunks=2)
    halves = torch.cat([expected(model, each, (0, 3)) for each in (positive, negative)])
    # A matmul of six rows may round otherwise than one of three.
    torch.testing.assert_close(velocity, halves, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("sigma", "acts"), [(1.0, True), (0.76, True), (0.75, False), (0.5, False)])
def test_window_holds_its_start_and_not_its_end(nodes, model, sigma, acts):
    inputs = rows()
    patcher = edited(nodes, comfy_stand_in.Patcher(model), (0, 3), end=0.25)
    assert torch.equal(patcher.run(inputs, sigma, LATENT), model.observe(inputs)[0]) != acts


def test_context_tokens_are_left_alone(nodes, model):
    # The batch holds the tokens of an image of 8x4 and of a context image of the same size.
    inputs, seen = rows(), {}
    patcher = edited(nodes, comfy_stand_in.Patcher(model), (0,))

    def look(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.setdefault((extra_options["block_type"], extra_options["block_index"]), (k, v))
        return {}

    before = comfy_stand_in.Patcher(model)
    before.set_model_attn1_patch(look)
    before.run(inputs, 0.8, (8, 4))
    plain = dict(seen)
    seen.clear()
    patcher.set_model_attn1_patch(look)
    patcher.run(inputs, 0.8, (8, 4))
    num_txt = inputs.txt.shape[1]
    for own, now in zip(plain["double", 0], seen["double", 0], strict=True):
        assert torch.equal(own[:, :, num_txt + 8 :], now[:, :, num_txt + 8 :])
        assert torch.equal(
            now[1:, :, num_txt : num_txt + 8], own[:1, :, num_txt : num_txt + 8].expand(2, -1, -1, -1)
        )
        assert torch.equal(own[:, :, :num_txt], now[:, :, :num_txt])


@pytest.mark.parametrize("calls_attn1", [True, False], ids=["attn1_patch", "replaced blocks"])
def test_nodes_in_a_chain_act_together(nodes, model, calls_attn1):
    inputs = rows()
    one = edited(nodes, comfy_stand_in.Patcher(model, calls_attn1), (0, 3))
    two = edited(nodes, edited(nodes, comfy_stand_in.Patcher(model, calls_attn1), (0,)), (3,))
    assert torch.equal(two.run(inputs, 0.8, LATENT), one.run(inputs, 0.8, LATENT))
    twice = edited(nodes, one, (0, 3))
    assert torch.equal(twice.run(inputs, 0.8, LATENT), one.run(inputs, 0.8, LATENT))


def test_a_skipped_layer_stays_skipped_beside_an_edit(nodes, model):
    inputs = rows()
    skip = Intervention(skip=frozenset({3}))
    skipped = nodes.SkipLayers.execute(comfy_stand_in.Patcher(model), "3", 0.0, 1.0).args[0]
    assert torch.equal(skipped.run(inputs, 0.8, LATENT), model.observe(inputs, skip)[0])
    both = edited(nodes, skipped, (0, 3)).run(inputs, 0.8, LATENT)
    _, recorded = model.observe(inputs, Intervention(keep=frozenset({0})))
    inject = {0: tuple(x[:1] for x in recorded.kept[0])}
    assert torch.equal(both, model.observe(inputs, replace(skip, inject=inject))[0])


def test_nodes_leave_the_model_they_are_given_alone(nodes, model):
    inputs, patcher = rows(), comfy_stand_in.Patcher(model)
    edited(nodes, patcher, (0, 3))
    nodes.SkipLayers.execute(patcher, "3", 0.0, 1.0)
    assert torch.equal(patcher.run(inputs, 0.8, LATENT), model.observe(inputs)[0])


def test_one_row_alone_is_not_edited(nodes, model):
    inputs = rows(1)
    velocity = edited(nodes, comfy_stand_in.Patcher(model), (0, 3)).run(inputs, 0.8, LATENT)
    assert torch.equal(velocity, model.observe(inputs)[0])


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (8, 8), (100, 30)])
def test_outside_a_mask_of_any_size_edits_are_the_reference(nodes, model, size):
    mask = torch.zeros(1, *size)
    mask[:, size[0] // 2 :] = 1
    patcher = edited(nodes, comfy_stand_in.Patcher(model), (0,), mask=mask)
    denoised = torch.randn(3, 16, *LATENT)
    held = patcher.post_cfg[0]({"denoised": denoised})
    if size != (1, 1):
        assert torch.equal(held[1:, :, :3], denoised[:1, :, :3].expand(2, -1, -1, -1))
    torch.testing.assert_close(held[1:, :, 5:], denoised[1:, :, 5:])
    assert torch.equal(held[:1], denoised[:1])


def test_a_photograph_holds_the_first_row(nodes, model):
    photo, denoised = torch.randn(1, 16, *LATENT), torch.randn(3, 16, *LATENT)
    patcher = edited(nodes, comfy_stand_in.Patcher(model), (0,), photograph={"samples": photo})
    held = patcher.post_cfg[0]({"denoised": denoised})
    assert torch.equal(held, torch.cat((photo, denoised[1:])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (0, 7)}, r"layers \[7\].*0\.\.6"),
        ({"start": 0.5, "end": 0.25}, "start_percent 0.5 after end_percent 0.25"),
        ({"mask": torch.zeros(1, 8, 8)}, "without white"),
    ],
)
def test_wrong_input_is_told(nodes, model, changes, words):
    given = {"layers": (0,), **changes}
    with pytest.raises(ValueError, match=words):
        edited(nodes, comfy_stand_in.Patcher(model), **given)


def test_skipping_nothing_is_told(nodes, model):
    with pytest.raises(ValueError, match="Got no layers to skip"):
        nodes.SkipLayers.execute(comfy_stand_in.Patcher(model), " ", 0.0, 1.0)


def test_a_photograph_of_another_size_is_told(nodes, model):
    photo = {"samples": torch.randn(1, 16, 4, 4)}
    patcher = edited(nodes, comfy_stand_in.Patcher(model), (0,), photograph=photo)
    with pytest.raises(ValueError, match="connect the same latent"):
        patcher.post_cfg[0]({"denoised": torch.randn(3, 16, *LATENT)})


def test_a_model_of_another_kind_is_told(nodes, model):
    patcher = comfy_stand_in.Patcher(model)
    patcher.model.diffusion_model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear, which has no double-stream blocks"):
        edited(nodes, patcher, (0,))
