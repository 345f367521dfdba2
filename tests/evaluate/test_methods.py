"""A batch's edits are those that `flux.editing.edit.edit` makes one by one."""

import numpy as np
import pytest
import torch
from helpers.evaluation import SIDE, settings_of
from PIL import Image

import flux.editing.automask
import flux.editing.batches
from flux.editing.edit import edit
from flux.evaluate.benchmark import Item, read_benchmark
from flux.evaluate.methods import MethodRunner
from flux.evaluate.resolve import resolve_methods


@pytest.fixture(scope="module")
def items(benchmark) -> list[Item]:
    return read_benchmark(benchmark)[:2]


@pytest.mark.parametrize(
    ("references", "fields"),
    [
        ("photo", {"name": "default"}),
        ("photo", {"name": "published", "as_published": True}),
        ("photo", {"name": "FlowEdit", "inversion": "none"}),
        ("photo", {"name": "mask", "mask": "given"}),
        ("photo", {"name": "auto", "mask": "auto"}),
        ("generated", {"name": "default"}),
    ],
)
def test_a_batch_is_what_edit_makes_one_by_one(nano, benchmark, items, tmp_path, fields, references):
    """Rows of one batch, each with its own photograph, prompts and mask, within a grey level of 255."""
    photos = references == "photo"
    [method] = resolve_methods(settings_of(benchmark, tmp_path, methods=[fields], references=references))
    made = MethodRunner(nano, (SIDE, SIDE), photos=photos).run(method, items)
    for item, found in zip(items, made):
        given = method.settings.mask == "given"
        own = {"prompt": item.source, "edits": (item.target,), "seed": 0 if photos else item.seed}
        settings = method.settings.model_copy(update=own | ({"mask": None} if given else {}))
        photo, mask = item.photo(SIDE, SIDE) if photos else None, item.mask(SIDE, SIDE) if given else None
        alone = edit(nano, settings, method.layers, photo, mask, progress=False)
        assert_close(found.image, alone.edits[0])
        if not photos:
            assert_close(found.reference, alone.reference)


@pytest.mark.parametrize("whole_image", [False, True])
@pytest.mark.parametrize("references", ["photo", "generated"])
def test_masks_of_a_batch_are_those_of_one_by_one(
    nano, benchmark, items, tmp_path, monkeypatch, references, whole_image
):
    """To the token, where each row has words, a source and a part to change, or a subject, of its own."""
    monkeypatch.setattr(flux.editing.automask, "THRESHOLD", 1.0)
    monkeypatch.setattr(flux.editing.automask, "WHOLE_IMAGE", 0.0 if whole_image else 1.0)
    found, make = [], flux.editing.batches.auto_mask

    def auto_mask(*given):
        found.append(make(*given))
        return found[-1]

    monkeypatch.setattr(flux.editing.batches, "auto_mask", auto_mask)
    size = {"width": 128, "height": 128}
    settings = settings_of(benchmark, tmp_path, methods=[{"name": "x"}], references=references, **size)
    runner = MethodRunner(nano, (128, 128), photos=references == "photo")
    for part in (items, items[:1], items[1:]):
        runner.run(resolve_methods(settings)[0], part)
    masks, subjects = zip(*found)
    together, *alone = subjects if whole_image else masks
    assert torch.equal(together, torch.cat(alone))
    assert 0 < together[0].sum() < 64
    assert not torch.equal(*together)
    if whole_image:
        assert all(mask.all() for mask in masks)
    else:
        assert subjects == (None,) * 3, "a subject is looked for where all may change"


def assert_close(a: Image.Image, b: Image.Image) -> None:
    difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()
    assert difference <= 1, f"{difference} of 255"


def test_img2img_of_a_batch_is_generate(nano, benchmark, items, tmp_path):
    method = resolve_methods(settings_of(benchmark, tmp_path))[1]
    made = MethodRunner(nano, (SIDE, SIDE), seed=5).run(method, items)
    for item, found in zip(items, made):
        photo = item.photo(SIDE, SIDE)
        kept = {name: getattr(method.settings, name) for name in ("num_steps", "guidance", "true_cfg")}
        size = {"width": SIDE, "height": SIDE}
        seeds = [5 + item.seed]
        [alone] = nano.generate(
            [item.target], seeds, **size, **kept, image=photo, strength=0.5, progress=False
        )
        assert_close(found.image, alone)


def test_reconstruct_aims_at_the_photographs_own_prompt(nano, benchmark, items, tmp_path):
    [method] = resolve_methods(settings_of(benchmark, tmp_path, methods=[{"name": "x"}]))
    [made, _] = MethodRunner(nano, (SIDE, SIDE), reconstruct=True).run(method, items)
    own = {"prompt": items[0].source, "edits": (items[0].source,)}
    settings = method.settings.model_copy(update=own)
    alone = edit(nano, settings, method.layers, items[0].photo(SIDE, SIDE), progress=False)
    assert_close(made.image, alone.edits[0])


def test_evaluations_are_counted_in_pictures(nano, benchmark, items, tmp_path):
    """Two steps of Euler's inversion, of the reference, and of the edit, each once for each of the items."""
    fields = {"name": "x", "inversion": "euler", "dose": "paper"}
    [method] = resolve_methods(settings_of(benchmark, tmp_path, methods=[fields], true_cfg=1.0))
    made = MethodRunner(nano, (SIDE, SIDE)).run(method, items)
    assert [each.evaluations for each in made] == [6, 6]


def test_the_masks_of_edits_are_compared_with_the_benchmarks(nano, benchmark, items, tmp_path, monkeypatch):
    """Token by token, without the benchmark's guard around the image; nothing where no mask is found."""
    tokens = (SIDE // 16) ** 2
    found = torch.zeros(len(items), tokens, 1, dtype=torch.bool)
    found[:, :5] = True
    monkeypatch.setattr(flux.editing.batches, "auto_mask", lambda *_: (found, None))
    methods = [{"name": "auto", "mask": "auto"}, {"name": "given", "mask": "given"}]
    auto, given = resolve_methods(settings_of(benchmark, tmp_path, methods=methods))
    runner = MethodRunner(nano, (SIDE, SIDE))
    for item, made in zip(items, runner.run(auto, items)):
        pixels = np.asarray(item.mask(SIDE, SIDE, guarded=False))
        exact = pixels.reshape(SIDE // 16, 16, SIDE // 16, 16).any(axis=(1, 3)).reshape(-1)
        mine = found[0, :, 0].numpy()
        assert made.mask_iou == pytest.approx((mine & exact).sum() / (mine | exact).sum())
    assert [made.mask_iou for made in runner.run(given, items)] == [None] * len(items)
