"""Kept references, on any device."""

import pytest
import torch
from helpers import tiny_models
from helpers.editing import EDITS, LAYERS, ONE, STEPS, TOKENS, half_mask, make, settings
from helpers.images import difference

from flux.editing import reference
from flux.editing.edit import edit, edit_reference
from flux.editing.reference import keep_reference
from flux.errors import InputError


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"weight": 0.6, "falling": True, "true_cfg": 1.0},
        {"mask": "auto"},
        {"mask": "auto", "parts": "qkv", "weight": 0.6},
    ],
)
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


def test_queries_are_kept_where_all_edits_name_them(small):
    """In the vital layers alone, in every step. An edit that asks for more than is kept is refused."""
    wanted = settings(num_steps=2, parts="qv")
    kept = keep_reference(small, wanted, (1, 2), progress=False)
    for step in kept.steps:
        assert {layer for layer, parts in step.kept.positive.items() if len(parts) == 3} == {1, 2}
    with pytest.raises(InputError, match="another parts than"):
        edit_reference(small, kept, EDITS, settings(num_steps=2), progress=False)
    plain = keep_reference(small, settings(num_steps=2), (1, 2), progress=False)
    with_queries = [{"prompt": EDITS[0], "parts": "qkv"}]
    with pytest.raises(InputError, match="kept without them"):
        edit_reference(small, plain, with_queries, settings(num_steps=2), progress=False)


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
    from flux.loaded_model import LoadedModel

    wanted = settings(edits=EDITS[:2], device="cuda", true_cfg=true_cfg)
    pipe, results = LoadedModel.load(wanted), []
    for fits in (True, False):
        monkeypatch.setattr(reference, "fits_on_device", lambda *_, fits=fits: fits)
        kept = keep_reference(pipe, wanted, LAYERS, progress=False)
        assert all(x.is_cuda is fits for x in kept.steps[0].tensors())
        results.append(edit_reference(pipe, kept, EDITS[:2], wanted, progress=False))
    assert all(difference(a, b) == 0 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", ["noising", "midpoint", "directedit", "none", "decflowedit"])
def test_a_kept_photograph(small, photo, method):
    wanted = settings(edits=EDITS[:2], inversion=method, batch_size=2)
    at_once = edit(small, wanted, LAYERS, photo, half_mask(photo.size), progress=False)
    kept = keep_reference(small, wanted, LAYERS, photo, progress=False)
    later = edit_reference(small, kept, EDITS[:2], wanted, mask=half_mask(photo.size), progress=False)
    assert difference(kept.image, at_once.reference) == 0
    assert all(difference(a, b) == 0 for a, b in zip(later, at_once.edits, strict=True))
