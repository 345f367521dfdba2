"""Edits on flux-nano: what stays as it was, what changes, what is refused."""

import pytest
import torch
from helpers.editing import (
    DOG,
    EDITS,
    HEIGHT,
    LAYERS,
    ONE,
    STEPS,
    TOKENS,
    WIDTH,
    half_mask,
    make,
    settings,
    through,
)
from helpers.images import difference, rms
from PIL import Image

from flux import sampling
from flux.editing.edit import edit, edit_reference
from flux.editing.photo import Photograph
from flux.editing.reference import keep_reference
from flux.errors import InputError, Stopped
from flux.intervention import NOTHING, Intervention

# ---- edits of a generated image


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


LONG = "a dog and a cat on the grass " * 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prompt", "edited", "hint"),
    [
        (LONG + "at sunset", LONG + "in the snow", "it sees their first 40 tokens, shorten both"),
        (DOG, f"{DOG} ", "it has no tokens for what differs"),
    ],
)
def test_an_edit_that_is_the_reference_to_the_model_is_refused(small, passes, prompt, edited, hint):
    with pytest.raises(InputError, match=f"Got the edit {edited[:20]!r}".rstrip("'") + f".*{hint}"):
        make(small, prompt=prompt, edits=[edited])
    assert passes == []


@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_a_kept_reference_that_is_the_same_to_the_model_is_refused(small):
    wanted = settings(num_steps=1, prompt=LONG + "at sunset")
    kept = keep_reference(small, wanted, LAYERS, progress=False)
    with pytest.raises(InputError, match="shorten both"):
        edit_reference(small, kept, [LONG + "in the snow"], wanted, progress=False)


def test_a_photo_in_the_settings_alone_is_refused(small, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    wanted = settings(photo=str(tmp_path / "photo.png"))
    for work in (edit, keep_reference):
        with pytest.raises(InputError, match=r"photo\.png', but no image"):
            work(small, wanted, LAYERS)


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


# ---- edits of a photograph


def test_paint_on_a_transparent_layer_is_told_and_nothing_else_changes(small, capsys, tmp_path):
    layer = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, WIDTH // 2, HEIGHT))
    layer.save(tmp_path / "layer.png")
    plain, given, file = (
        edit(small, settings(**ONE, **changes), LAYERS, None, mask)
        for changes, mask in (({}, half_mask()), ({}, layer), ({"mask": str(tmp_path / "layer.png")}, None))
    )
    assert difference(plain.edits[0], given.edits[0]) == 0
    assert difference(plain.edits[0], file.edits[0]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "the mask: 50 % of the image may change",
        "the mask: 50 % of the image may change",
        f"{tmp_path / 'layer.png'}: 50 % of the image may change",
    ]


def test_a_photograph_and_its_edit(small, photo):
    result = make(small, photo, **ONE)
    assert difference(result.reference, through(small, photo)) <= 1
    assert rms(result.reference, Photograph.of(photo, WIDTH, HEIGHT).part) < 12
    assert result.edits[0].size == (WIDTH, HEIGHT)


def test_flow_edit_of_a_photograph(small, photo):
    """To the same prompt with the same guidance it is the photograph; masks hold here too."""
    same = {"inversion": "none", "guidance": 1.5, "true_cfg": 1.0}
    made = make(small, photo, edits=[DOG, EDITS[0]], **same)
    assert difference(made.reference, through(small, photo)) <= 1
    assert difference(made.reference, made.edits[0]) <= 1 < difference(made.reference, made.edits[1])
    with pytest.raises(InputError, match='"auto" with inversion "none"'):
        edit(small, settings(**ONE, **same, mask="auto"), LAYERS, photo, progress=False)


@pytest.mark.parametrize(("method", "steps"), [("midpoint", 4), ("noising", 2)])
def test_steps_of_a_photograph_count_its_inversion(small, photo, method, steps):
    seen, same = [], {**ONE, "num_steps": 2, "inversion": method}
    make(small, photo, **same, on_step=lambda step, index, total: seen.append((index, total)))
    assert seen == [(index, steps) for index in range(steps)]


def test_an_edit_is_pasted_back_into_the_photograph(small, photo):
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
