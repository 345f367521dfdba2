"""Adapters of conditions: their scenes, the widened input, the files they leave."""

import random

import pytest
import torch
from einops import rearrange
from helpers.training import inputs, randomized

from flux.model import Flux
from training.loop.models import TOY
from training.scenes.render import Renderer
from training.stages.adapters import DRAW, EXTRA_CHANNELS, adapted, pack_mask, widened
from training.stages.schnell import lora_weights, merged

SIDE = 64


def drawn(kind, seed=0):
    return DRAW[kind](random.Random(seed), Renderer("cpu"), 6, SIDE)


def test_a_scene_before_and_after_an_edit_has_the_same_textures():
    seed = next(seed for seed in range(9) if random.Random(seed).random() > 0.5)  # an edit of a subject
    scenes = drawn("kontext", seed)
    changed = (scenes.target != scenes.condition).any(1).float().mean((1, 2))
    assert (changed > 0).all()
    assert (changed < 0.6).all()
    assert len(scenes.texts) == 6


def test_a_masked_scene_is_whole_outside_its_mask():
    scenes = drawn("fill")
    assert torch.equal(scenes.condition, scenes.target * (scenes.mask == 0))
    share = scenes.mask.mean((1, 2, 3))
    assert ((share > 0) & (share < 1)).all()


def test_edges_are_black_and_white():
    scenes = drawn("canny")
    assert set(scenes.condition.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(scenes.condition[:, 0], scenes.condition[:, 2])


def test_each_pixel_of_a_token_is_a_channel_of_the_mask():
    mask = (torch.rand(2, 1, 32, 48) > 0.5).float()
    packed = pack_mask(mask)
    tokens = rearrange(mask, "b 1 (h ph r) (w pw s) -> b (h w) (r s ph pw)", ph=2, pw=2, r=8, s=8)
    assert torch.equal(packed, tokens)


@pytest.mark.parametrize("kind", EXTRA_CHANNELS)
def test_an_adapter_begins_as_its_base_and_merges_to_what_it_learned(kind):
    base, given, extra = randomized(Flux(TOY.flux)), inputs(), EXTRA_CHANNELS[kind]
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    expected = base(**given)
    given["img"] = torch.cat((given["img"], torch.randn(*given["img"].shape[:2], extra)), dim=2)
    student = adapted(widened(base, extra), rank=4, text=True)
    torch.testing.assert_close(student(**given), expected)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if extra:
        weights["img_in.weight"] = torch.nn.functional.pad(weights["img_in.weight"], (0, extra))
    whole = Flux(student.params)
    whole.load_state_dict(merged(weights, lora_weights(student.state_dict(), weights)))
    torch.testing.assert_close(whole(**given), student(**given), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", EXTRA_CHANNELS)
def test_a_stage_leaves_a_lora(work, kind):
    lora = torch.load(work.result(kind))
    assert lora["img_in.lora_A.weight"].shape[1] == 64 + EXTRA_CHANNELS[kind]
    assert not any("mod" in name for name in lora)
    assert (work.folder / "assets" / f"{kind}_lora.safetensors").is_file()
