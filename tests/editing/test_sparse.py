"""Sparse steps: tokens that may not change are not computed, and the others come out as in whole passes."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from helpers.editing import DOG, EDITS, HEIGHT, LAYERS, ONE, STEPS, TOKENS, WIDTH, half_mask, make
from helpers.editing import settings as settings_of
from helpers.images import difference
from PIL import Image

import flux.editing.batches as batch_room
import flux.editing.reference as reference_room
from flux.editing.batches import Batch
from flux.editing.edit import edit_reference
from flux.editing.reference import keep_reference
from flux.editing.sparse import group_rows
from flux.intervention import Intervention
from flux.sampling import Conditioning, euler_step

LEFT = torch.arange(TOKENS) % (WIDTH // 16) < WIDTH // 32  # the white half of `half_mask`
EVERY = frozenset(range(tiny_models.NUM_LAYERS))


@pytest.fixture
def latents(monkeypatch) -> list:
    """After each step of a batch, the reference's latent and the edits'."""
    found, take_step = [], Batch.step

    def step(batch, pipe, model, source, reference):
        taken = take_step(batch, pipe, model, source, reference)
        found.append((reference.next_latent, batch.latent))
        return taken

    monkeypatch.setattr(Batch, "step", step)
    return found


def computed(passes) -> list[int | None]:
    """The number of tokens that each pass computes; None for all."""
    return [None if given.free is None else len(given.free.computed) for given in passes]


def corner_mask() -> Image.Image:
    """White in one token of the lower right corner."""
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (WIDTH - 16, HEIGHT - 16, WIDTH, HEIGHT))
    return mask


def save(mask: Image.Image, path) -> str:
    mask.save(path)
    return str(path)


@torch.inference_mode()
@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
@pytest.mark.parametrize("with_photo", [False, True])
@pytest.mark.parametrize("models", ["small", "steered"])
def test_a_whole_pass_with_all_else_held_gives_the_same(
    request, photo, latents, true_cfg, with_photo, models
):
    """Each step anew by its definition: whole passes of reference and edit, in which all layers take the
    reference's keys and values outside the mask, and the vital layers everywhere, in the steps of the dose.
    """
    small = request.getfixturevalue(models)
    options = {"true_cfg": true_cfg, "inject_until": 0.4, "weight": 0.7, "guidance": 3.5}
    sources, start = [], Batch.start.__func__

    def noted(cls, pipe, source, *rest):
        sources.append(source)
        return start(cls, pipe, source, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "start", classmethod(noted))
        make(small, photo if with_photo else None, **ONE, mask=half_mask(), sparse=True, **options)
    [source], ids = sources, small.image_ids(1, WIDTH, HEIGHT)
    cfg = {"true_cfg": true_cfg, "negative_prompt": ""}
    cond = small.condition(EDITS[:1], 3.5, **cfg)
    unguided = replace(source.cond, true_cfg=1.0) if source.path else source.cond
    edit = reference = source.start
    worst = 0.0
    for index, (t, t_next) in enumerate(zip(source.levels, source.levels[1:])):
        if source.path:
            reference = source.path[index]
        kept = euler_step(small.model, reference, ids, unguided, t, t_next, Intervention(keep=EVERY))
        inside = 0.7 if index < 2 else 0.0
        weights = {n: torch.where(LEFT, inside if n in LAYERS else 0.0, 1.0)[None] for n in EVERY}
        each = kept.kept.map(lambda kv, weights=weights: Intervention(inject=kv, inject_weights=weights))
        step = euler_step(small.model, edit, ids, cond, t, t_next, each)
        reference = source.path[index + 1] if source.path else kept.latent
        drift = reference - kept.latent
        edit = torch.where(LEFT[:, None], step.latent + drift, reference)
        ours, got = latents[index]
        assert torch.equal(got[:, ~LEFT], ours[:, ~LEFT])
        worst = max(worst, tiny_models.relative_error(got, edit))
    assert worst < 1e-5
    make(small, photo if with_photo else None, **ONE, mask=half_mask(), sparse=False, **options)
    assert tiny_models.relative_error(latents[-1][1], edit) > 1e-3, "whole steps are the same"


def test_a_mask_of_all_tokens_gives_whole_steps_bit_for_bit(small, passes, latents):
    white = Image.new("L", (WIDTH, HEIGHT), 255)
    make(small, mask=white, sparse=True)
    assert set(computed(passes)) == {None}
    sparse = latents.copy()
    latents.clear()
    make(small, mask=white, sparse=False)
    assert all(torch.equal(a, b) for pair in zip(sparse, latents, strict=True) for a, b in zip(*pair))


def test_only_free_tokens_are_computed(small, passes, latents):
    """Each pass of true guidance by itself; the reference's passes keep all layers."""
    make(small, **ONE, mask=corner_mask(), sparse=True, inject_until=0.4)
    assert computed(passes) == [None, None, 1, 1] * STEPS
    assert all(given.keep == EVERY for given in passes if given.free is None)
    assert all(bool(given.inject) == (number < 8) for number, given in enumerate(passes) if given.free)


def test_masks_that_differ_have_passes_of_their_own(small, passes, tmp_path):
    """In one batch: a half, a corner, the same half again."""
    half, corner = save(half_mask(), tmp_path / "half.png"), save(corner_mask(), tmp_path / "corner.png")
    masks = [half, corner, half]
    edits = [{"prompt": prompt, "mask": mask} for prompt, mask in zip(EDITS, masks)]
    common = {"true_cfg": 1.0, "sparse": True, "inject_until": 0.4}
    together = make(small, edits=edits, batch_size=3, **common)
    assert computed(passes) == [None, TOKENS // 2, 1] * STEPS
    for number, one in enumerate(edits):
        alone = make(small, edits=[one], **common)
        assert difference(alone.edits[0], together.edits[number]) <= 1
        assert difference(alone.reference, together.reference) == 0


def test_a_turn_is_sparse_too(small, passes, tmp_path):
    mask = save(half_mask(), tmp_path / "half.png")
    made = make(
        small,
        edits=[{"prompt": EDITS[0], "mask": mask, "then": [EDITS[1]]}],
        batch_size=1,
        sparse=True,
        true_cfg=1.0,
    )
    assert computed(passes) == [None, TOKENS // 2, TOKENS // 2] * STEPS
    [alone] = make(small, edits=[{"prompt": EDITS[1], "mask": mask}], sparse=True, true_cfg=1.0).edits
    assert difference(made.edits[1], alone) == 0


def test_an_automatic_mask_is_kept_to_from_its_step_on(small, passes, monkeypatch):
    """Whole steps until it is found; an edit of the whole image stays whole, and holds its subject."""
    part = LEFT[None, :, None]
    masks = {EDITS[0]: part, EDITS[2]: torch.ones_like(part)}
    monkeypatch.setattr(
        batch_room,
        "auto_mask",
        lambda pipe, model, source, step, cond, edits: (
            torch.cat([masks[prompt] for prompt in edits.prompts]),
            part[:, :, 0].expand(len(edits.prompts), -1),
        ),
    )
    both = {"dose": "auto", "num_steps": 8, "true_cfg": 1.0, "sparse": True, "batch_size": 2}
    made = make(small, edits=[EDITS[0], EDITS[2]], **both)
    whole, split = [None, None], [None, TOKENS // 2, None]
    assert computed(passes) == whole * 3 + split * 5
    later = [given for number, given in enumerate(passes) if number >= 6]
    assert all(given.keep == EVERY for given in later[::3])
    assert all(given.inject.keys() == set(LAYERS) for given in later[2::3])
    for number, prompt in enumerate((EDITS[0], EDITS[2])):
        alone = make(small, edits=[prompt], **both)
        assert difference(alone.edits[0], made.edits[number]) <= 1


@pytest.mark.parametrize(
    "more",
    [{"mimic_scale": 1.5}, {"correct_drift": False, "inversion": "midpoint"}, {"as_published": True}],
    ids=str,
)
def test_where_all_tokens_are_needed_steps_stay_whole(small, photo, passes, more):
    """A range over all tokens, or a reference's pass that no whole step would compute."""
    made = make(small, photo, **ONE, mask=half_mask((400, 200)), sparse=True, **more)
    assert set(computed(passes)) == {None}
    plain = make(small, photo, **ONE, mask=half_mask((400, 200)), sparse=False, **more)
    assert difference(made.edits[0], plain.edits[0]) == 0


def test_steps_show_the_reference_where_nothing_is_computed(small):
    """A preview of the clean image has no noise there."""
    shown = []
    make(
        small, **ONE, mask=half_mask(), sparse=True, true_cfg=1.0, on_step=lambda step, *_: shown.append(step)
    )
    whole = []
    make(
        small,
        edits=[DOG],
        mask=half_mask(),
        true_cfg=1.0,
        sparse=False,
        on_step=lambda step, *_: whole.append(step),
    )
    for sparse, plain in zip(shown, whole, strict=True):
        torch.testing.assert_close(sparse.clean[:, ~LEFT], plain.clean[:, ~LEFT], rtol=0, atol=1e-4)


@pytest.mark.parametrize("with_photo", [False, True])
def test_a_kept_reference_serves_sparse_edits(small, photo, passes, with_photo):
    """Bit for bit as beside it; without room for all layers, edits stay whole."""
    image, options = photo if with_photo else None, {"sparse": True, "inject_until": 0.4}
    mask = half_mask((400, 200) if with_photo else (WIDTH, HEIGHT))
    beside = make(small, image, **ONE, mask=mask, **options)
    wanted = settings_of(**ONE, **options)
    kept = keep_reference(small, wanted, LAYERS, image, progress=False)
    assert all(step.has_all(tiny_models.NUM_LAYERS) for step in kept.steps)
    passes.clear()
    [again] = edit_reference(small, kept, EDITS[:1], wanted, mask=mask, progress=False)
    assert computed(passes) == [TOKENS // 2] * 2 * STEPS
    assert difference(again, beside.edits[0]) == 0


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_a_kept_reference_in_the_room_that_there_is(small, passes, monkeypatch, true_cfg):
    """With less room all but the vital layers are rounded to 8 bits; with little, edits stay whole."""
    options = {"sparse": True, "true_cfg": true_cfg, "inject_until": 0.4}
    wanted = settings_of(**ONE, **options)

    def edit_with(room: float | None) -> tuple[int, Image.Image]:
        monkeypatch.setattr(reference_room, "total_memory", lambda device: room and 4 * room)
        kept = keep_reference(small, wanted, LAYERS[:2], progress=False)
        passes.clear()
        [image] = edit_reference(small, kept, EDITS[:1], wanted, mask=half_mask(), progress=False)
        return sum(step.num_bytes() for step in kept.steps), image

    every, exact = edit_with(None)
    beside = make(small, **ONE, layers=LAYERS[:2], mask=half_mask(), **options)
    assert difference(exact, beside.edits[0]) == 0
    size, rounded = edit_with(0.7 * every)
    assert size < 0.7 * every
    assert set(computed(passes)) == {TOKENS // 2}
    assert 0 < difference(rounded, exact) < 60
    size, _ = edit_with(0.3 * every)
    assert size == pytest.approx(every * 2 / tiny_models.NUM_LAYERS)
    assert set(computed(passes)) == {None}


def test_rows_by_their_tokens():
    mask = torch.zeros(4, 6, 1, dtype=torch.bool)
    mask[0, :2] = mask[2, :2] = mask[1, 5] = True
    mask[3] = True
    cond = Conditioning(*torch.zeros(3, 4, 1))
    groups = group_rows(mask, cond)
    assert [group.rows for group in groups] == [[0, 2], [1], [3]]
    assert [group.free and group.free.computed.tolist() for group in groups] == [[0, 1], [5], None]
    assert groups[1].free.others.tolist() == [0, 1, 2, 3, 4]
    assert group_rows(mask[3:], cond) == []
