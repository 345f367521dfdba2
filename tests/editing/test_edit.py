"""Edits on flux-nano: what the passes of each step hand over, and what stays as it was."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from PIL import Image

import flux.editing.batches as batch_room
from flux import sampling
from flux.editing import automask, reference
from flux.editing.batches import Batch
from flux.editing.edit import check_edits, edit, edit_reference
from flux.editing.inversion import INVERSIONS
from flux.editing.photo import Photograph
from flux.editing.reference import keep_reference
from flux.errors import InputError, Stopped
from flux.intervention import NOTHING, Intervention
from flux.settings.complete import resolve
from flux.settings.doses import DEFAULT_DOSE, DOSES
from flux.settings.edits import EditSettings
from flux.settings.files import check_settings
from flux.specs import VITAL_LAYERS_DEV, configs
from flux.vital_layers import PRESETS, find_vital_layers

DOG = "a dog on the grass"
EDITS = ["a cat on the grass", "a dog wearing a top hat on the grass", "a dog in the snow"]
WIDTH, HEIGHT, STEPS = 96, 64, 5
TOKENS = WIDTH * HEIGHT // 256
LAYERS = (0, 1, 2, 3, 4)
ONE = {"edits": EDITS[:1]}


@pytest.fixture(scope="module")
def small(nano):
    """flux-nano's texts and autoencoder around a transformer that takes no time: the pictures mean nothing,
    but nothing here asks for more.
    """
    net = tiny_models.flux(context_in_dim=256, vec_in_dim=128)
    return replace(nano, model=net, spec=replace(nano.spec, params=net.params))


def settings(**changes) -> EditSettings:
    """Small and quick, with two passes; the paper's dose unless another is named."""
    given = {"prompt": DOG, "edits": EDITS, "dose": "paper", "width": WIDTH, "height": HEIGHT, "seed": 3}
    given |= {"num_steps": STEPS, "guidance": 3.5, "true_cfg": 2.5, "device": "cpu"}
    return resolve(check_settings(EditSettings, given | changes))


def make(pipe, photo=None, layers=LAYERS, mask=None, on_step=None, **changes):
    return edit(pipe, settings(**changes), layers, photo, mask, on_step, progress=False)


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def rms(a: Image.Image, b: Image.Image) -> float:
    return float(np.sqrt(np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()))


@pytest.fixture
def passes(small, monkeypatch):
    """The interventions of the transformer's passes, as they are made."""
    found, observe = [], small.model.observe

    def observing(inputs, intervention, **more):
        found.append(intervention)
        return observe(inputs, intervention, **more)

    monkeypatch.setattr(small.model, "observe", observing)
    return found


@pytest.fixture(scope="module")
def edited(small):
    with torch.inference_mode():
        return make(small)


@pytest.fixture(scope="module")
def photo(small):
    """Of another size and shape than the edits'."""
    size = {"width": 128, "height": 64, "num_steps": 6, "guidance": 3.5}
    with torch.inference_mode():
        [picture] = small.generate([DOG], [11], **size, progress=False)
    return picture.resize((400, 200))


# ---- edits of a generated picture


def test_the_reference_is_the_picture_without_edits(small, edited):
    [plain] = small.generate([DOG], [3], **settings().sampling(), progress=False)
    assert difference(edited.reference, plain) == 0


def test_edits_of_flux_nano_change_something_and_keep_something(nano):
    """Nearer to the reference than the same prompts from the same noise alone."""
    size = {"width": 128, "height": 128, "num_steps": 3, "edits": EDITS[:2], "batch_size": 2, "true_cfg": 1.0}
    injected, alone = (make(nano, **size, weight=weight) for weight in (1.0, 0.0))
    for with_injection, without in zip(injected.edits, alone.edits, strict=True):
        assert 1 < rms(with_injection, injected.reference) < 0.9 * rms(without, injected.reference)


def test_batch_size_and_order_do_not_matter(small, edited):
    together = make(small, batch_size=3)
    backwards = make(small, edits=EDITS[::-1], batch_size=2)
    assert difference(together.reference, edited.reference) == 0
    assert difference(backwards.reference, edited.reference) == 0
    for one, batched, turned in zip(edited.edits, together.edits, backwards.edits[::-1], strict=True):
        assert difference(one, batched) <= 1
        assert difference(one, turned) <= 1


def test_an_edit_to_the_same_prompt_is_the_reference(small):
    same = make(small, edits=[DOG])
    assert difference(same.reference, same.edits[0]) <= 1


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.4), (0.4, 0.8)])
@pytest.mark.parametrize("true_cfg", [2.5, 1.0])
def test_edit_is_two_samplings_side_by_side(small, window, true_cfg):
    """The reference's sampling keeps, the edit's takes, both passes of it, in the window's steps alone."""
    got = make(small, **ONE, true_cfg=true_cfg, inject_from=window[0], inject_until=window[1])

    inside = range(round(window[0] * STEPS), round(window[1] * STEPS))
    levels, ids = small.schedule(STEPS, WIDTH, HEIGHT), small.image_ids(1, WIDTH, HEIGHT)
    source, other = (small.condition([prompt], 3.5, true_cfg) for prompt in (DOG, EDITS[0]))
    noise = small.noise([3], WIDTH, HEIGHT)

    def taking():
        keep = Intervention(keep=frozenset(LAYERS))
        for index, step in enumerate(sampling.sample(small.model, noise, ids, source, levels, keep)):
            inject = step.kept.map(lambda kept: Intervention(inject=kept))
            yield inject if index in inside else NOTHING

    *_, last = sampling.sample(small.model, noise, ids, other, levels, taking())
    assert difference(got.edits[0], *small.decode(last.latent, WIDTH, HEIGHT)) == 0


def test_no_more_passes_than_needed(small, passes):
    """Each step one pass for the reference and one for each batch of edits, twice with a negative prompt: and
    the reference keeps nothing where nothing takes.
    """
    make(small, batch_size=2, inject_until=0.4)
    assert len(passes) == STEPS * 2 * 3
    assert [bool(given.keep) for given in passes[::6]] == [True, True, False, False, False]


def test_the_second_pass_may_begin_later(small, passes):
    """From step 2 of 5 on: three passes more for the reference, and for the edit."""
    make(small, **ONE, cfg_from=0.4)
    assert len(passes) == 2 * STEPS + 2 * 3
    injected = [given.inject[0][0] for given in passes if given.inject]
    assert len(injected) == 2 + 2 * 3
    # Each pass injects what the reference's pass of the same kind kept.
    assert not any(torch.equal(*pair) for pair in zip(injected[2::2], injected[3::2]))


def test_negative_prompts_reach_reference_and_edits(small, edited):
    other = make(small, negative_prompt="a car")
    assert difference(other.reference, edited.reference) > 5
    assert all(difference(a, b) > 5 for a, b in zip(other.edits, edited.edits))


def test_guidance_of_each_edit(small, monkeypatch):
    """One batch with a guidance for each row; the reference keeps that of all."""
    asked, condition = [], small.condition
    monkeypatch.setattr(
        small, "condition", lambda *args, **more: asked.append(args) or condition(*args, **more)
    )
    make(small, edits=[EDITS[0], {"prompt": EDITS[1], "guidance": 1.5}], batch_size=2)
    assert asked == [([DOG], 3.5), (EDITS[:2], [3.5, 1.5])]


def test_steps_are_shown_and_may_stop_the_run(small):
    seen = []

    def on_step(step, index, total):
        seen.append((index, total, step.clean.shape))
        if index == 2:
            raise Stopped

    with pytest.raises(Stopped):
        make(small, on_step=on_step)
    assert seen == [(index, STEPS, (1, TOKENS, 64)) for index in range(3)]


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
    ("parts", "there"), [("k", (True, False)), ("v", (False, True)), ("kv", (True, True))]
)
def test_keys_or_values_alone(small, passes, parts, there):
    make(small, **ONE, true_cfg=1.0, parts=parts)
    assert [tuple(x is not None for x in given.inject[0]) for given in passes if given.inject] == [
        there
    ] * STEPS


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


# ---- turns


def test_turns_take_from_the_first_source(small, edited):
    """Each turn is an edit of the same reference: no drift, whatever the turns before it did."""
    chain = make(small, edits=[{"prompt": EDITS[0], "then": [EDITS[1], EDITS[2]]}])
    assert all(difference(a, b) == 0 for a, b in zip(chain.edits, edited.edits, strict=True))


def test_turns_inherit():
    """From the turn before, or from the settings; a dose of its own replaces all numbers before it."""
    entries = settings(
        weight=0.5,
        edits=[
            "a",
            {"prompt": "b", "dose": "add", "guidance": 2, "then": ["c", {"prompt": "d", "weight": 0.1}, "e"]},
            "f",
        ],
    ).entries
    assert [entry.prompt for entry in entries] == list("abcdef")
    assert [entry.dose for entry in entries] == ["paper", "add", "add", "add", "add", "paper"]
    assert [entry.weight for entry in entries] == [0.5, None, None, 0.1, 0.1, 0.5]
    assert [entry.guidance for entry in entries] == [3.5, 2, 2, 2, 2, 3.5]


# ---- masks


def half_mask(size=(WIDTH, HEIGHT)) -> Image.Image:
    """White on the left half."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_outside_the_mask_is_the_reference(small, monkeypatch):
    """Its tokens exactly, at every step; pixels up to the decoder's reach. Inside, the edit is at work."""
    latents, take_step = [], Batch.step

    def step(batch, pipe, model, source, index, reference_step):
        taken = take_step(batch, pipe, model, source, index, reference_step)
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
    assert found[0][1].sum() == TOKENS // 2


@pytest.mark.parametrize("kept", [False, True])
def test_the_subject_is_held_longer_where_all_may_change(small, passes, monkeypatch, kept):
    """By the default dose: beside an edit of a part, which is held as by itself, in three of ten steps."""
    part = torch.zeros(1, TOKENS, 1, dtype=torch.bool)
    part[:, :7] = True
    masks = {EDITS[0]: part, EDITS[2]: torch.ones_like(part)}
    subject = part[:, :, 0]

    def auto_mask(pipe, model, source, step, batch, edit_step) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.cat([masks[prompt] for prompt in batch.prompts])
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
    found, changed = [], batch_room.changed_tokens
    monkeypatch.setattr(
        batch_room, "changed_tokens", lambda *given: found.append(changed(*given)) or found[-1]
    )
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
    source = reference.find_source(small, edits)

    def masks(mask):
        batches = batch_room.start_batches(
            small, source, edits, LAYERS, check_edits(edits, LAYERS, mask=mask)
        )
        place = {n: "all" if b.mask is None else "some" for b in batches for n in b.places}
        return [place[n] for n in range(4)], [
            n for b in batches if b.kind.dose.mask == "auto" for n in b.places
        ]

    assert masks(None) == (["all", "all", "some", "all"], [0])
    assert masks(half_mask()) == (["some", "all", "some", "some"], [])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (WIDTH, HEIGHT)), "black all over"),
        (Image.new("L", (WIDTH, HEIGHT + 1), 255), "96x65 pixels: expected 96x64"),
    ],
)
def test_masks_that_cannot_be_used(small, monkeypatch, mask, message):
    monkeypatch.setattr(small, "condition", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match=message):
        make(small, mask=mask)


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
    wanted = settings(true_cfg=1.0)
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
    with pytest.raises(InputError, match="another seed, num_steps"):
        edit_reference(small, kept, EDITS, settings(num_steps=2, seed=9), progress=False)


def test_where_a_reference_is_kept(small):
    """Its steps' keys and values may be copied to another device."""
    kept = keep_reference(small, settings(num_steps=1), (1, 2), progress=False)
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


def through(small, photo: Image.Image) -> Image.Image:
    return small.decode(small.encode(Photograph.of(photo, WIDTH, HEIGHT).part), WIDTH, HEIGHT)[0]


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


def test_a_photograph_and_its_edit(small, photo):
    result = make(small, photo, **ONE)
    assert difference(result.reference, through(small, photo)) <= 1
    assert rms(result.reference, Photograph.of(photo, WIDTH, HEIGHT).part) < 12
    assert result.edits[0].size == (WIDTH, HEIGHT)


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
    seen, edits, euler_step = [], [], reference.euler_step

    def reference_step(model, img, ids, cond, t, t_next, intervention):
        seen.append(t)
        return euler_step(model, img, ids, cond, t, t_next, intervention)

    def edit_step(model, img, ids, cond, t, t_next, intervention):
        edits.append((img, bool(intervention.positive.inject)))
        return euler_step(model, img, ids, cond, t, t_next, intervention)

    monkeypatch.setattr(reference, "euler_step", reference_step)
    monkeypatch.setattr(batch_room, "euler_step", edit_step)
    source = reference.find_source(small, settings(**ONE), photo)
    levels = source.levels[:-1]
    for drift, expected in ((True, levels), (False, levels[:2])):
        seen.clear(), edits.clear()
        make(small, photo, **ONE, inject_until=0.4, correct_drift=drift)
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


def test_flow_edit_of_a_photograph(small, photo):
    """To the same prompt with the same guidance it is the photograph; masks hold here too."""
    same = {"inversion": "none", "guidance": 1.5, "true_cfg": 1.0}
    made = make(small, photo, edits=[DOG, EDITS[0]], **same)
    assert difference(made.reference, through(small, photo)) <= 1
    assert difference(made.reference, made.edits[0]) <= 1 < difference(made.reference, made.edits[1])
    with pytest.raises(InputError, match='"auto" with inversion "none"'):
        edit(small, settings(**ONE, **same, mask="auto"), LAYERS, photo, progress=False)


@pytest.mark.parametrize("method", ["midpoint", "none"])
def test_a_kept_photograph(small, photo, method):
    wanted = settings(edits=EDITS[:2], inversion=method, batch_size=2)
    at_once = edit(small, wanted, LAYERS, photo, half_mask(photo.size), progress=False)
    kept = keep_reference(small, wanted, LAYERS, photo, progress=False)
    later = edit_reference(small, kept, EDITS[:2], wanted, mask=half_mask(photo.size), progress=False)
    assert difference(kept.image, at_once.reference) == 0
    assert all(difference(a, b) == 0 for a, b in zip(later, at_once.edits, strict=True))


def test_steps_of_a_photograph_count_its_inversion(small, photo):
    seen = []
    make(small, photo, **ONE, num_steps=2, on_step=lambda step, index, total: seen.append((index, total)))
    assert seen == [(index, 4) for index in range(4)]


def test_pasted_back(small, photo):
    """The whole photograph, untouched outside the middle that was edited, and where the mask forbids it."""
    made = make(small, photo, **ONE, paste_back=True)
    left, top, right, bottom = Photograph.of(photo, WIDTH, HEIGHT).box
    assert (left, top, right, bottom) == (50, 0, 350, 200)
    for picture in (made.reference, *made.edits):
        assert picture.size == photo.size
        assert difference(picture.crop((0, 0, left, 200)), photo.crop((0, 0, left, 200))) == 0
        assert difference(picture.crop((right, 0, 400, 200)), photo.crop((right, 0, 400, 200))) == 0
        assert rms(picture, photo) > 1
    masked = make(small, photo, **ONE, paste_back=True, mask=half_mask(photo.size))
    assert difference(masked.edits[0].crop((200, 0, 400, 200)), photo.crop((200, 0, 400, 200))) == 0


# ---- which layers


def test_vital_layers_by_name():
    dev, nano = configs["flux-dev"], configs["flux-nano"]
    assert find_vital_layers("auto", dev) == find_vital_layers("stable-flow", dev) == VITAL_LAYERS_DEV
    assert find_vital_layers("auto", nano) == (4, 0)
    assert set(VITAL_LAYERS_DEV) - set(find_vital_layers("stable-flow-code", dev)) == {2}
    assert find_vital_layers([3, 1], nano) == (3, 1)
    assert find_vital_layers("all", nano) == tuple(range(15))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sets_of_layers_of_dev(name):
    layers = find_vital_layers(name, configs["flux-dev"])
    assert layers == PRESETS[name]
    assert len(set(layers)) == len(layers)


def test_vital_layers_from_a_scan(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps({"vital_layers": [2, 5], "top": 2}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (2, 5)
    vitality = {"02": {"vitality": 0.1}, "05": {"vitality": 0.4}, "02-05": {"vitality": 0.5}}
    path.write_text(json.dumps({"vital_layers": [2, 5], "vitality": vitality}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (5, 2), "the most vital first"


def test_vital_layers_that_nobody_knows():
    with pytest.raises(InputError, match="not known: scan it"):
        find_vital_layers("auto", configs["flux-schnell"])


@pytest.mark.parametrize("choice", [[57], "stable-flow"], ids=str)
def test_vital_layers_that_the_model_lacks(choice):
    with pytest.raises(InputError, match=r"0\.\.14"):
        find_vital_layers(choice, configs["flux-nano"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[0, 1]",
        '{"layers": [0]}',
        '{"vital_layers": []}',
        '{"vital_layers": ["0"]}',
        '{"vital_layers": [true]}',
    ],
)
def test_files_that_are_no_scans(tmp_path, content):
    path = tmp_path / "vital_layers.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"vital_layers\.json"):
        find_vital_layers(str(path), configs["flux-nano"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG"])
def test_files_that_are_no_text(tmp_path, content):
    (tmp_path / "scan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.json"):
        find_vital_layers(str(tmp_path / "scan.json"), configs["flux-nano"])


def test_a_name_that_is_no_preset_and_no_file():
    with pytest.raises(InputError, match="'stable-flo', which is no file and no preset"):
        find_vital_layers("stable-flo", configs["flux-nano"])
