"""Sources of edits: their references, replayed from a photograph's inversion."""

from itertools import pairwise

import pytest
import torch
from helpers.editing import DOG, HEIGHT, LAYERS, ONE, STEPS, WIDTH, make, settings
from helpers.images import difference, rms
from torch.testing import assert_close

import flux.editing.batches as batch_room
import flux.editing.source as source_room
from flux.editing.edit import edit
from flux.editing.inversion import INVERSIONS, velocity_at
from flux.editing.photo import Photograph
from flux.editing.run import run_batches
from flux.editing.source import find_source
from flux.intervention import Intervention
from flux.sampling import euler_step


@pytest.mark.parametrize("nudging", [None, 1.0, 1.3])
@pytest.mark.parametrize("method", INVERSIONS)
def test_the_reference_of_a_photograph_ends_at_its_own_latent(small, photo, method, nudging):
    """Replayed from the inversion's path with the clean latent included, nudging undone: to 1e-4, so that it
    decodes to what the autoencoder makes of the photograph.
    """
    wanted = settings(**ONE, inversion=method, nudging=nudging, num_steps=2, true_cfg=1.0)
    source = find_source(small, wanted, photo)
    clean = small.encode(Photograph.of(photo, WIDTH, HEIGHT).part)
    with small.denoising() as model:
        steps = list(source.steps(model, lambda _: frozenset(LAYERS)))
    assert (steps[-1].next_latent / source.scale - clean).abs().max() < 1e-4
    assert [step.t for step in steps] == source.levels[:-1]
    assert all(torch.equal(step.latent, latent) for step, latent in zip(steps, source.path))
    assert not any(step.tensors() for step in steps), "one step's keys and values at a time"
    factor = nudging or (1.15 if method == "euler" else 1.0)
    assert source.scale == factor
    assert torch.equal(source.path[-1], factor * clean)
    assert len(source.path) == 3
    assert torch.equal(source.start, source.path[0])


@pytest.mark.parametrize("method", INVERSIONS)
def test_an_edit_to_the_photographs_own_prompt_is_the_photograph(small, photo, method):
    """However coarse the inversion: what the reference's own steps miss, the edit makes up for."""
    same = {"edits": [DOG], "weight": 0.0, "true_cfg": 1.0, "guidance": 1.0, "num_steps": 3}
    made = make(small, photo, inversion=method, **same)
    assert difference(made.edits[0], made.reference) <= 1
    if method == "directedit":
        return  # it has no drift
    drifting = make(small, photo, inversion=method, correct_drift=False, **same)
    assert rms(drifting.edits[0], made.reference) > 0.5


def test_edits_of_a_photograph_take_from_the_inversions_path(small, photo, monkeypatch):
    """Passes outside the window are only made to correct drift; edits start from the noisiest latent."""
    inverted = {**ONE, "inversion": "midpoint"}
    seen, edits, euler_step = [], [], source_room.euler_step

    def reference_step(model, img, ids, cond, t, t_next, intervention, **more):
        seen.append(t)
        return euler_step(model, img, ids, cond, t, t_next, intervention, **more)

    def edit_step(model, img, ids, cond, t, t_next, intervention, **more):
        edits.append((img, bool(intervention.positive.inject)))
        return euler_step(model, img, ids, cond, t, t_next, intervention, **more)

    monkeypatch.setattr(source_room, "euler_step", reference_step)
    monkeypatch.setattr(batch_room, "euler_step", edit_step)
    source = find_source(small, settings(**inverted), photo)
    levels = source.levels[:-1]
    for drift, expected in ((True, levels), (False, levels[:2])):
        seen.clear(), edits.clear()
        make(small, photo, **inverted, inject_until=0.4, correct_drift=drift)
        assert seen == expected
        assert [injected for _, injected in edits] == [True] * 2 + [False] * 3
        assert torch.equal(edits[0][0], source.start)


def test_directedit_takes_its_steps_where_the_inversion_took_them(small, photo, passes):
    """DirectEdit's formula, written out. The reference is computed only in steps that inject."""
    wanted = settings(**ONE, inversion="directedit", weight=0.0, true_cfg=1.0)
    source = find_source(small, wanted, photo)
    [batch] = batch_room.start_batches(small, source, LAYERS, [None])
    ids, latent, steps = small.image_ids(1, WIDTH, HEIGHT), source.start, pairwise(source.levels)
    for (t, t_next), (noisy, clean) in zip(steps, pairwise(source.path), strict=True):
        velocity = velocity_at(small.model, latent + clean - noisy, ids, batch.cond, t)
        latent = latent + (t_next - t) * velocity
    run_batches(small, source, [batch])
    assert_close(batch.latent, latent, rtol=0, atol=1e-5)
    passes.clear()
    make(small, photo, **ONE, inversion="directedit", parts="v", inject_until=0.4, true_cfg=1.0)
    assert len(passes) == STEPS + 2 + STEPS
    injected = [bool(given.inject) for given in passes[STEPS:]]
    assert injected == [False, True, False, True, False, False, False]


def test_directedit_injects_what_the_inversion_saw(small, photo):
    """The reference's keys and values in a step are those of the inversion's own pass of that step."""
    source = find_source(small, settings(**ONE, inversion="directedit", true_cfg=1.0), photo)
    layers = frozenset(LAYERS)
    with small.denoising() as model:
        steps = source.steps(model, lambda _: layers)
        for step, clean in zip(steps, source.path[1:], strict=True):
            own = euler_step(
                model, clean, source.img_ids, source.cond, step.t, 0.0, Intervention(keep=layers)
            )
            for layer, pair in own.kept.positive.items():
                assert_close(step.kept.positive[layer], pair, rtol=0, atol=1e-4)


def test_a_photograph_is_inverted_without_a_second_pass(small, photo, passes):
    """Guidance away from a negative prompt would lead the inversion astray: one pass for each step."""
    make(small, photo, **ONE, inversion="euler")
    assert len(passes) == STEPS + STEPS * 2 * 2


def test_edits_of_a_photograph_as_the_public_code_makes_them(small, photo):
    """Two levels behind from the second step on, after the first at the cleanest noisy one; nudged when it is
    decoded; guidance 1 for the photograph, 3 for edits.
    """
    wanted = settings(**ONE, photo="photo.png", guidance=None, as_published=True, true_cfg=1.0)
    assert wanted.guidance == 3.0
    assert settings(**ONE, guidance=2.0, as_published=True).guidance == 2.0
    assert settings(**ONE, guidance=None, as_published=True).guidance == 3.5, "a generated reference"
    true = find_source(small, settings(**ONE, inversion="euler"), photo).path
    source = find_source(small, wanted, photo)
    assert source.scale == 1.0
    assert source.cond.guidance.item() == 1.0
    for latent, level in zip(source.path, [0, STEPS - 1, 0, 1, 2, 3], strict=True):
        assert torch.equal(latent, true[level])
    made = edit(small, wanted, LAYERS, photo, progress=False)
    assert difference(made.reference, *small.decode(true[STEPS - 2], WIDTH, HEIGHT)) == 0
