"""References: kept on any device, replayed from a photograph's inversion."""

import pytest
import torch
from helpers import tiny_models
from helpers.editing import (
    DOG,
    EDITS,
    HEIGHT,
    LAYERS,
    ONE,
    STEPS,
    TOKENS,
    WIDTH,
    difference,
    half_mask,
    make,
    rms,
    settings,
)

import flux.editing.batches as batch_room
from flux.editing import reference
from flux.editing.edit import edit, edit_reference
from flux.editing.inversion import INVERSIONS
from flux.editing.photo import Photograph
from flux.editing.reference import keep_reference
from flux.errors import InputError

# ---- a kept reference


@pytest.mark.parametrize("more", [{}, {"weight": 0.6, "falling": True, "true_cfg": 1.0}, {"mask": "auto"}])
def test_edits_of_a_kept_reference_are_those_in_one_go(small, more):
    wanted = settings(edits=EDITS[:2], batch_size=2, **more)
    at_once = edit(small, wanted, LAYERS, progress=False)
    kept = keep_reference(small, wanted, LAYERS, progress=False)
    later = edit_reference(small, kept, wanted.edits, wanted, progress=False)
    assert difference(kept.image, at_once.reference) == 0
    assert all(difference(a, b) == 0 for a, b in zip(later, at_once.edits, strict=True))


def test_another_edit_of_a_kept_reference_costs_one_image_a_step(small, passes):
    wanted = settings(true_cfg=1.0, sparse=False)
    kept = keep_reference(small, wanted, LAYERS, progress=False)
    assert len(passes) == STEPS
    assert all(given.keep == set(LAYERS) for given in passes)
    passes.clear()
    edit_reference(small, kept, EDITS[:1], wanted, progress=False)
    assert len(passes) == STEPS
    assert not any(given.keep for given in passes)


def test_fewer_layers_than_were_kept(small):
    wanted = settings(**ONE, vital_layers=[1, 3])
    kept = keep_reference(small, wanted, LAYERS, progress=False)
    [later] = edit_reference(small, kept, EDITS[:1], wanted, progress=False)
    assert difference(later, make(small, **ONE, layers=(1, 3)).edits[0]) == 0
    with pytest.raises(InputError, match=r"\[9\]"):
        edit_reference(small, kept, EDITS[:1], settings(vital_layers=[1, 9]), progress=False)


def test_a_kept_reference_is_bound_to_what_it_was_kept_with(small):
    kept = keep_reference(small, settings(num_steps=1), LAYERS, progress=False)
    with pytest.raises(InputError, match="another num_steps, seed"):
        edit_reference(small, kept, EDITS, settings(num_steps=2, seed=9), progress=False)


def test_where_a_reference_is_kept(small):
    """Its steps' keys and values may be copied to another device."""
    kept = keep_reference(small, settings(num_steps=1, sparse=False), (1, 2), progress=False)
    [step] = kept.steps
    width = tiny_models.PARAMS.hidden_size
    assert step.num_bytes() == 2 * 2 * 2 * TOKENS * width * 4, "two layers, keys and values, both passes"
    there = step.to(torch.device("meta"))
    assert len(there.tensors()) == 8
    assert all(x.is_meta for x in there.tensors())
    assert there.latent.is_cpu
    assert reference.fits_on_device(torch.device("cpu"), 2**60)


@pytest.mark.gpu
@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_main_memory_gives_back_the_same(nano, monkeypatch, true_cfg):
    """Pinned, and fetched a step ahead beside the work."""
    from flux.pipeline import Pipeline

    wanted = settings(edits=EDITS[:2], device="cuda", true_cfg=true_cfg)
    pipe, results = Pipeline.load(wanted), []
    for fits in (True, False):
        monkeypatch.setattr(reference, "fits_on_device", lambda *_, fits=fits: fits)
        kept = keep_reference(pipe, wanted, LAYERS, progress=False)
        assert all(x.is_cuda is fits for x in kept.steps[0].tensors())
        results.append(edit_reference(pipe, kept, EDITS[:2], wanted, progress=False))
    assert all(difference(a, b) == 0 for a, b in zip(*results, strict=True))


# ---- edits of a photograph


@pytest.mark.parametrize("nudging", [None, 1.0, 1.3])
@pytest.mark.parametrize("method", INVERSIONS)
def test_the_reference_of_a_photograph_ends_at_its_own_latent(small, photo, method, nudging):
    """Replayed from the inversion's path with the clean latent included, nudging undone: to 1e-4, so that it
    decodes to what the autoencoder makes of the photograph.
    """
    wanted = settings(**ONE, inversion=method, nudging=nudging, num_steps=2, true_cfg=1.0)
    source = reference.find_source(small, wanted, photo)
    clean = small.encode(Photograph.of(photo, WIDTH, HEIGHT).part)
    with small.denoising() as model:
        steps = list(source.steps(model, small.image_ids(1, WIDTH, HEIGHT), lambda _: frozenset(LAYERS)))
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
    drifting = make(small, photo, inversion=method, correct_drift=False, **same)
    assert rms(drifting.edits[0], made.reference) > 0.5


def test_edits_of_a_photograph_take_from_the_inversions_path(small, photo, monkeypatch):
    """Passes outside the window are only made to correct drift; edits start from the noisiest latent."""
    inverted = {**ONE, "inversion": "midpoint"}
    seen, edits, euler_step = [], [], reference.euler_step

    def reference_step(model, img, ids, cond, t, t_next, intervention):
        seen.append(t)
        return euler_step(model, img, ids, cond, t, t_next, intervention)

    def edit_step(model, img, ids, cond, t, t_next, intervention):
        edits.append((img, bool(intervention.positive.inject)))
        return euler_step(model, img, ids, cond, t, t_next, intervention)

    monkeypatch.setattr(reference, "euler_step", reference_step)
    monkeypatch.setattr(batch_room, "euler_step", edit_step)
    source = reference.find_source(small, settings(**inverted), photo)
    levels = source.levels[:-1]
    for drift, expected in ((True, levels), (False, levels[:2])):
        seen.clear(), edits.clear()
        make(small, photo, **inverted, inject_until=0.4, correct_drift=drift)
        assert seen == expected
        assert [injected for _, injected in edits] == [True] * 2 + [False] * 3
        assert torch.equal(edits[0][0], source.start)


def test_a_photograph_is_inverted_without_a_second_pass(small, photo, passes):
    """Guidance away from a negative prompt would lead the inversion astray: one pass for each step."""
    make(small, photo, **ONE, inversion="euler")
    assert len(passes) == STEPS + STEPS * 2 * 2


def test_as_published(small, photo):
    """Two levels behind from the second step on, after the first at the cleanest noisy one; nudged when it is
    decoded; guidance 1 for the photograph, 3 for edits.
    """
    wanted = settings(**ONE, photo="photo.png", guidance=None, as_published=True, true_cfg=1.0)
    assert wanted.guidance == 3.0
    assert settings(**ONE, guidance=2.0, as_published=True).guidance == 2.0
    assert settings(**ONE, guidance=None, as_published=True).guidance == 3.5, "a generated reference"
    true = reference.find_source(small, settings(**ONE, inversion="euler"), photo).path
    source = reference.find_source(small, wanted, photo)
    assert source.scale == 1.0
    assert source.cond.guidance.item() == 1.0
    for latent, level in zip(source.path, [0, STEPS - 1, 0, 1, 2, 3], strict=True):
        assert torch.equal(latent, true[level])
    made = edit(small, wanted, LAYERS, photo, progress=False)
    assert difference(made.reference, *small.decode(true[STEPS - 2], WIDTH, HEIGHT)) == 0


@pytest.mark.parametrize("method", ["noising", "midpoint", "none", "decflowedit"])
def test_a_kept_photograph(small, photo, method):
    wanted = settings(edits=EDITS[:2], inversion=method, batch_size=2)
    at_once = edit(small, wanted, LAYERS, photo, half_mask(photo.size), progress=False)
    kept = keep_reference(small, wanted, LAYERS, photo, progress=False)
    later = edit_reference(small, kept, EDITS[:2], wanted, mask=half_mask(photo.size), progress=False)
    assert difference(kept.image, at_once.reference) == 0
    assert all(difference(a, b) == 0 for a, b in zip(later, at_once.edits, strict=True))
