"""A photograph's path of added noise: edits beside it are FlowEdit's."""

import pytest
import torch
from helpers.editing import DOG, HEIGHT, LAYERS, ONE, WIDTH, half_mask, make, settings
from helpers.images import difference
from torch.testing import assert_close

import flux.editing.flow_edit
from flux.editing.batches import start_batches
from flux.editing.flow_edit import FlowEdit
from flux.editing.noising import noised_path
from flux.editing.photo import Mask, Photograph, token_mask
from flux.editing.run import run_batches
from flux.editing.source import find_source

PLAIN = {"weight": 0.0, "true_cfg": 1.0}


def test_the_path_is_the_photograph_with_new_noise_in_each_step(small, photo):
    clean = small.encode(Photograph.of(photo, WIDTH, HEIGHT).part)
    path = noised_path(small, clean, [1.0, 0.5, 0.25, 0.0], WIDTH, HEIGHT, seed=3)
    noises = [small.noise([3 + index], WIDTH, HEIGHT) for index in range(3)]
    assert_close(path[0], noises[0])
    assert_close(path[1], 0.5 * clean + 0.5 * noises[1])
    assert_close(path[2], 0.75 * clean + 0.25 * noises[2])
    assert torch.equal(path[3], clean)
    assert len(path) == 4


def test_edits_beside_the_path_are_flow_edits(small, photo, monkeypatch):
    """Whole steps without kv, if FlowEdit takes every step. In float32, where both differ by rounding."""
    monkeypatch.setattr(flux.editing.flow_edit, "FLOW_EDIT_SKIPS", 0.0)
    mask = half_mask((WIDTH, HEIGHT))
    tokens = token_mask(mask, [(WIDTH, HEIGHT)], WIDTH, HEIGHT)
    for masks in ([None], [Mask(mask, tokens)]):
        wanted = settings(**ONE, **PLAIN, seed=5, sparse=False)
        source = find_source(small, wanted, photo)
        [batch] = start_batches(small, source, LAYERS, masks)
        run_batches(small, source, [batch])
        free = settings(**ONE, **PLAIN, seed=5, inversion="none")
        walked = find_source(small, free, photo)
        noises = [small.noise([5 + index], WIDTH, HEIGHT) for index in range(source.num_steps)]
        how = walked.start, walked.img_ids, walked.cond, batch.cond, walked.levels, noises
        *_, end = FlowEdit(small.model, *how).edits(tokens if masks[0] else None)
        assert_close(batch.latent, end, rtol=0, atol=2e-5)
        assert (end - walked.start).abs().max() > 0.1, "the edit changes the photograph"


def test_an_edit_to_the_photographs_own_prompt_is_the_photograph(small, photo):
    made = make(small, photo, edits=[DOG], guidance=1.5, **PLAIN)
    assert difference(made.edits[0], made.reference) <= 1


def test_what_the_mask_does_not_free_is_the_photograph(small, photo):
    """As the autoencoder decodes it, wherever the edit's own pixels are too far to matter."""
    wanted = settings(**ONE)
    source = find_source(small, wanted, photo)
    tokens = torch.zeros(1, (WIDTH // 16) * (HEIGHT // 16), 1, dtype=torch.bool)
    tokens[:, 0] = True
    [batch] = start_batches(small, source, LAYERS, [Mask(half_mask((WIDTH, HEIGHT)), tokens)])
    end = run_batches(small, source, [batch])
    assert torch.equal(end, source.path[-1])
    assert torch.equal(batch.latent[:, 1:], end[:, 1:])
    assert not torch.equal(batch.latent[:, :1], end[:, :1])


def test_a_photograph_with_noise_costs_two_passes_a_step(small, photo, passes):
    """The reference's and the edit's; nothing is inverted."""
    make(small, photo, **ONE, **PLAIN, num_steps=3)
    assert len(passes) == 2 * 3


@pytest.mark.parametrize(
    ("how", "steps"),
    [
        ({}, 7),
        ({"inversion": "midpoint"}, 5),
        ({"inject_until": 0.1}, 2),
        ({"dose": "balanced"}, 10),
    ],
)
def test_how_long_kv_is_injected(small, photo, how, steps):
    """The automatic dose injects for longer beside added noise, unless a number is given."""
    wanted = settings(**{**ONE, "num_steps": 20, "dose": "auto", "true_cfg": 1.0, "photo": "a.png", **how})
    source = find_source(small, wanted, photo)
    [batch] = start_batches(small, source, LAYERS, [None])
    assert sorted(batch.shares) == list(range(steps))
