"""Batches of edits: how much each step injects, where, and what may change."""

from itertools import pairwise

import pytest
import torch
from helpers.editing import DOG, EDITS, HEIGHT, LAYERS, ONE, STEPS, TOKENS, WIDTH, half_mask, make, settings
from helpers.images import difference, rms
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import flux.editing.batches as batch_room
from flux.editing import automask
from flux.editing.batches import Batch, group_edits
from flux.editing.edit import check_edits, edit, edit_reference
from flux.editing.reference import keep_reference
from flux.editing.source import find_source
from flux.errors import InputError
from flux.settings.doses import DEFAULT_DOSE, DOSES
from flux.settings.edits import Turn

# ---- doses


def taken(passes, layer: int) -> list:
    """In each pass of the one edit: the weight in a layer, 0 where nothing is taken."""
    return [given.inject_weights.get(layer, 1) if layer in given.inject else 0 for given in passes[1::2]]


def test_weights_by_layer_and_fewer_layers(small, passes):
    make(small, **ONE, true_cfg=1.0, weight={"0": 0.25, "2": 0.0}, top=4, inject_until=0.2)
    assert [taken(passes, layer)[0] for layer in LAYERS] == [0.25, 1, 0, 1, 0]
    assert passes[0].keep == {0, 1, 3}, "kept is what is taken"


def test_a_falling_weight(small, passes):
    """From the first step of the window on, by equal parts, never quite to nothing within it."""
    make(small, **ONE, true_cfg=1.0, falling=True, weight=0.8, inject_from=0.2, inject_until=1.0)
    weights = [given.inject_weights.get(0, 0) for given in passes[1::2]]
    assert weights == pytest.approx([0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(
    ("parts", "there"),
    [
        ("k", (True, False)), ("v", (False, True)), ("kv", (True, True)),
        ("q", (False, False, True)), ("qv", (False, True, True)), ("qkv", (True, True, True)),
    ],
)  # fmt: skip
def test_keys_values_or_queries_alone(small, passes, parts, there):
    make(small, **ONE, true_cfg=1.0, parts=parts)
    assert [tuple(x is not None for x in given.inject[0]) for given in passes if given.inject] == [
        there
    ] * STEPS


@pytest.mark.parametrize("mask", ["none", "auto"])
def test_all_parts_of_all_layers_are_the_reference(small, mask):
    """An edit to the reference's own prompt, whose attention takes everything of the image from it."""
    same = {"edits": [{"prompt": DOG, "mask": mask}], "layers": range(small.model.num_layers)}
    made = make(small, **same, parts="qkv")
    assert difference(made.edits[0], made.reference) == 0


def test_queries_count(small, edited):
    """They keep more of the reference than keys and values do alone."""
    more = make(small, parts="qkv")
    for kv, qkv in zip(edited.edits, more.edits, strict=True):
        assert rms(qkv, more.reference) < 0.97 * rms(kv, edited.reference)


def test_edits_of_several_doses_in_one_run(small, edited):
    """Each as alone, in the order asked for, whatever shares a batch."""
    several = [EDITS[0], {"prompt": EDITS[1], "weight": 0.3}, EDITS[2], {"prompt": EDITS[1], "parts": "v"}]
    mixed = make(small, edits=several, batch_size=2)
    alone = [edited.edits[0], make(small, edits=[EDITS[1]], weight=0.3).edits[0], edited.edits[2]]
    alone.append(make(small, edits=[EDITS[1]], parts="v").edits[0])
    assert all(difference(a, b) <= 1 for a, b in zip(mixed.edits, alone, strict=True))
    assert difference(mixed.edits[1], edited.edits[1]) > 2


def test_no_weight_is_no_injection(small):
    alone = make(small, **ONE, weight=0.0)
    [plain] = small.generate(EDITS[:1], [3], **settings().sampling(), progress=False)
    assert difference(alone.edits[0], plain) == 0


@pytest.mark.parametrize("name", DOSES)
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_every_dose_works_at_usual_numbers_of_steps(name, steps):
    check_edits(settings(dose=name, num_steps=steps), LAYERS)
    assert DEFAULT_DOSE in DOSES


def test_a_window_without_steps_is_told_before_any_work(small, monkeypatch):
    monkeypatch.setattr(small, "condition", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match="5 steps, none of which"):
        make(small, inject_until=0.05)


def test_weights_for_layers_that_are_not_vital(small):
    with pytest.raises(InputError, match=r"\[7\].*vital layers are \[0, 1, 2, 3, 4\]"):
        make(small, weight={"7": 0.5})


# ---- masks


def test_outside_the_mask_is_the_reference(small, monkeypatch):
    """Its tokens exactly, at every step; pixels up to the decoder's reach. Inside, the edit is at work."""
    latents, take_step = [], Batch.step

    def step(batch, pipe, model, source, reference_step):
        taken = take_step(batch, pipe, model, source, reference_step)
        latents.append((reference_step.next_latent, batch.latent))
        return taken

    monkeypatch.setattr(Batch, "step", step)
    make(small, mask=half_mask(), **ONE, inject_until=0.4)
    left = torch.arange(TOKENS) % (WIDTH // 16) < WIDTH // 32
    assert len(latents) == STEPS
    for ours, edits in latents:
        assert torch.equal(ours[:, ~left], edits[:, ~left])
    assert (ours[:, left] - edits[:, left]).abs().max() > 0.1


def test_outside_the_mask_all_is_taken(small, passes):
    """Inside as much as the dose says."""
    make(small, **ONE, mask=half_mask(), true_cfg=1.0, weight=0.5)
    weights = next(given.inject_weights[0] for given in passes if given.inject)
    assert weights.shape == (1, TOKENS)
    row = weights[0].reshape(HEIGHT // 16, WIDTH // 16)
    assert torch.equal(row[0], torch.tensor([0.5, 0.5, 0.5, 1, 1, 1]))


def test_a_mask_of_each_edit(small, tmp_path):
    """From a file, for one edit of two; a turn inherits it."""
    half_mask().save(tmp_path / "mask.png")
    masked = {"prompt": EDITS[0], "mask": str(tmp_path / "mask.png"), "then": [EDITS[1]]}
    found = check_edits(settings(edits=[masked, EDITS[2]]), LAYERS)
    assert [mask is not None for mask in found] == [True, True, False]
    assert found[0].tokens.sum() == TOKENS // 2


@pytest.mark.parametrize("kept", [False, True])
def test_the_subject_is_held_longer_where_all_may_change(small, passes, monkeypatch, kept):
    """By the default dose: beside an edit of a part, which is held as by itself, in three of ten steps."""
    part = torch.zeros(1, TOKENS, 1, dtype=torch.bool)
    part[:, :7] = True
    masks = {EDITS[0]: part, EDITS[2]: torch.ones_like(part)}
    subject = part[:, :, 0]

    def auto_mask(pipe, model, source, step, cond, edits) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.cat([masks[prompt] for prompt in edits.prompts])
        return mask, subject.expand(len(mask), -1)

    monkeypatch.setattr(batch_room, "auto_mask", auto_mask)
    common = {"num_steps": 10, "true_cfg": 1.0}

    def made(edits: list[str], **changes) -> list[Image.Image]:
        wanted = settings(**common, edits=edits, dose="auto", **changes)
        if kept:
            reference = keep_reference(small, wanted, LAYERS, progress=False)
            return edit_reference(small, reference, edits, wanted, progress=False)
        return edit(small, wanted, LAYERS, progress=False).edits

    def holds_subject() -> bool:
        weights = [weight for given in passes if given.inject for weight in given.inject_weights.values()]
        return any(torch.equal(weight, subject.float()) for weight in weights)

    both = made([EDITS[0], EDITS[2]])
    for picture, number, held_longer in zip(both, (0, 2), (False, True)):
        [alone] = made([EDITS[number]])
        assert difference(picture, alone) == 0
        passes.clear()
        [short] = made([EDITS[number]], inject_until=0.25)
        assert not holds_subject()
        assert (difference(alone, short) > 0) == held_longer
        made([EDITS[number]])
        assert holds_subject() == held_longer


def test_an_automatic_mask(small, passes, monkeypatch):
    """Found at one step, from the attention of the edit and of the reference, and kept to from then on; an
    edit that says the same may change all.
    """
    monkeypatch.setattr(automask, "THRESHOLD", 1.0)
    monkeypatch.setattr(automask, "WHOLE_IMAGE", 1.0)
    found, changed = [], automask.changed_tokens
    monkeypatch.setattr(automask, "changed_tokens", lambda *given: found.append(changed(*given)) or found[-1])
    plain = {"prompt": EDITS[0], "mask": "none"}
    auto = make(small, edits=[{"prompt": EDITS[0], "mask": "auto"}, plain, {"prompt": DOG, "mask": "auto"}])
    assert sum(bool(given.watch) for given in passes) == 2 * 2
    assert 0 < found[0].sum() < TOKENS
    assert found[1].all()
    assert difference(auto.edits[0], auto.edits[1]) > 0


def test_what_differs_all_over_may_change_all_over(small, monkeypatch):
    """Whatever attends to the words. The rule itself: tests/test_automask.py."""
    monkeypatch.setattr(automask, "THRESHOLD", 1.0)
    monkeypatch.setattr(automask, "WHOLE_IMAGE", 0.0)
    made = make(small, edits=[{"prompt": EDITS[0], "mask": mask} for mask in ("auto", "none")])
    assert difference(*made.edits) == 0


def test_the_mask_of_a_dose(small, tmp_path):
    """Where an edit says nothing of one; a picture that is given counts more, "none" most."""
    half_mask().save(tmp_path / "mask.png")
    own = [{}, {"mask": "none"}, {"mask": str(tmp_path / "mask.png")}, {"dose": "paper"}]
    edits = settings(dose="auto", edits=[{"prompt": EDITS[0], **each} for each in own])
    source = find_source(small, edits)

    def masks(mask):
        batches = batch_room.start_batches(small, source, LAYERS, check_edits(edits, LAYERS, mask=mask))
        place = {n: "all" if b.mask is None else "some" for b in batches for n in b.places}
        return [place[n] for n in range(4)], [
            n for b in batches if b.kind.dose.mask == "auto" for n in b.places
        ]

    assert masks(None) == (["all", "all", "some", "all"], [0])
    assert masks(half_mask()) == (["some", "all", "some", "some"], [])


# ---- which edits share a batch


def test_edits_of_one_dose_share_batches():
    """In their order, whatever stands between them, at most `batch_size` each."""
    entries = settings(
        edits=["a", {"prompt": "b", "weight": 0.5}, "c", {"prompt": "d", "parts": "k"}, "e"]
    ).entries
    found = group_edits(entries, [False] * 5, 2)
    assert [places for _, places in found] == [[0, 2], [4], [1], [3]]
    assert [kind.dose.weight for kind, _ in found] == [1.0, 1.0, 0.5, 1.0]
    assert [kind.parts for kind, _ in found] == ["kv", "kv", "kv", "k"]


def test_a_painted_mask_takes_the_place_of_an_automatic_one():
    entries = settings(dose="auto", edits=["a", "b", {"prompt": "c", "mask": "none"}]).entries
    found = group_edits(entries, [False, True, False], 8)
    kinds = [(places, kind.dose.mask, kind.painted) for kind, places in found]
    assert kinds == [([0], "auto", False), ([1], None, True), ([2], None, False)]


@given(
    st.lists(st.tuples(st.sampled_from([None, 0.3, {3: 0.5}]), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_every_edit_is_in_one_batch(edits, batch_size):
    """Each batch has one kind, and only the last batch of a kind has room left."""
    entries = [Turn(prompt="a", dose="paper", weight=weight, parts="kv") for weight, _ in edits]
    found = group_edits(entries, [painted for _, painted in edits], batch_size)
    assert sorted(place for _, places in found for place in places) == list(range(len(edits)))
    for kind, places in found:
        assert {edits[place][1] for place in places} == {kind.painted}
        assert all((edits[place][0] or 1.0) == kind.dose.weight for place in places)
        assert places == sorted(places)
    for (kind, places), (following, _) in pairwise(found):
        assert kind != following or len(places) == batch_size
