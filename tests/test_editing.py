"""Edits on flux-nano: what the two passes of each step hand over, and what stays as it was."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flux import editing, sampling
from flux.editing import PRESETS, edit, find_vital_layers
from flux.errors import InputError
from flux.intervention import NOTHING, Intervention
from flux.specs import VITAL_LAYERS_DEV, configs

DOG = "a dog on the grass"
EDITS = ["a cat on the grass", "a dog wearing a top hat on the grass", "a dog in the snow"]
WIDTH, HEIGHT, STEPS = 128, 96, 5
SAMPLING = {"width": WIDTH, "height": HEIGHT, "num_steps": STEPS, "guidance": 3.5, "true_cfg": 3.5}
QUICK = {**SAMPLING, "layers": [0, 1, 2, 3, 4], "seed": 3, "progress": False}


def difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def rms(a: Image.Image, b: Image.Image) -> float:
    return float(np.sqrt(np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()))


@pytest.fixture(scope="module")
def edited(nano):
    with torch.inference_mode():
        return edit(nano, DOG, EDITS, **QUICK)


# ---- edits of a generated picture


def test_the_reference_is_the_picture_without_edits(nano, edited):
    [plain] = nano.generate([DOG], [3], **SAMPLING, progress=False)
    assert difference(edited.reference, plain) == 0


def test_edits_change_something_and_keep_something(nano, edited):
    """Nearer to the reference than the same prompts from the same noise alone."""
    alone = nano.generate(EDITS, [3] * 3, **SAMPLING, progress=False)
    for with_injection, without in zip(edited.edits, alone, strict=True):
        assert 2 < rms(with_injection, edited.reference) < 0.8 * rms(without, edited.reference)


def test_batch_size_and_order_do_not_matter(nano, edited):
    together = edit(nano, DOG, EDITS, **QUICK, batch_size=3)
    backwards = edit(nano, DOG, EDITS[::-1], **QUICK, batch_size=2)
    assert difference(together.reference, edited.reference) == 0
    assert difference(backwards.reference, edited.reference) == 0
    for one, batched, turned in zip(edited.edits, together.edits, backwards.edits[::-1], strict=True):
        assert difference(one, batched) <= 1
        assert difference(one, turned) <= 1


def test_an_edit_to_the_same_prompt_is_the_reference(nano):
    same = edit(nano, DOG, [DOG], **QUICK)
    assert difference(same.reference, same.edits[0]) <= 1


def test_more_layers_hold_more(nano, edited):
    everywhere = edit(nano, DOG, EDITS, **{**QUICK, "layers": range(15)})
    for all_layers, vital in zip(everywhere.edits, edited.edits):
        assert rms(all_layers, edited.reference) < rms(vital, edited.reference)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.0, 0.4), (0.4, 0.8)])
@pytest.mark.parametrize("true_cfg", [3.5, 1.0])
def test_edit_is_two_samplings_side_by_side(nano, window, true_cfg):
    """The reference's sampling keeps, the edit's takes, both passes of it, in the window's steps alone."""
    scale = {**QUICK, "true_cfg": true_cfg}
    got = edit(nano, DOG, EDITS[:1], **scale, inject_from=window[0], inject_until=window[1])

    inside = range(round(window[0] * STEPS), round(window[1] * STEPS))
    levels, ids = nano.schedule(STEPS, WIDTH, HEIGHT), nano.image_ids(1, WIDTH, HEIGHT)
    reference, other = (nano.condition([prompt], 3.5, true_cfg) for prompt in (DOG, EDITS[0]))
    noise = nano.noise([3], WIDTH, HEIGHT)

    def taking():
        keep = Intervention(keep=frozenset(range(5)))
        for index, step in enumerate(sampling.sample(nano.model, noise, ids, reference, levels, keep)):
            inject = Intervention(take=step.kept, take_negative=step.kept_negative)
            yield inject if index in inside else NOTHING

    *_, last = sampling.sample(nano.model, noise, ids, other, levels, taking())
    assert difference(got.edits[0], *nano.decode(last.latent, WIDTH, HEIGHT)) == 0


def test_no_more_passes_than_needed(nano, monkeypatch):
    """Each step one pass for the reference and one for each batch of edits, twice with a negative prompt: and
    the reference keeps nothing where nothing takes.
    """
    passes = []
    observe = nano.model.observe

    def counted(*given):
        passes.append(given[7])
        return observe(*given)

    monkeypatch.setattr(nano.model, "observe", counted)
    edit(nano, DOG, EDITS, **QUICK, batch_size=2, inject_until=0.4)
    assert len(passes) == STEPS * 2 * 3
    assert [bool(given.keep) for given in passes[::6]] == [True, True, False, False, False]


def test_negative_prompts_reach_reference_and_edits(nano, edited):
    other = edit(nano, DOG, EDITS, **QUICK, negative_prompt="a car")
    assert difference(other.reference, edited.reference) > 5
    assert all(difference(a, b) > 5 for a, b in zip(other.edits, edited.edits))


def test_a_window_without_steps_is_told_before_any_work(nano, monkeypatch):
    monkeypatch.setattr(nano, "condition", lambda *_: pytest.fail("worked"))
    with pytest.raises(InputError, match="window"):
        edit(nano, DOG, EDITS, **QUICK, inject_until=0.05)


# ---- edits of a photograph


@pytest.fixture(scope="module")
def photo(nano):
    """Of another size and shape than the edits'."""
    [picture] = nano.generate(
        [DOG], [11], **{**SAMPLING, "width": 192, "height": 96, "num_steps": 8}, progress=False
    )
    return picture.resize((400, 200))


@pytest.mark.parametrize("nudging", [1.0, 1.15])
def test_the_reference_of_a_photograph_is_what_the_autoencoder_makes_of_it(nano, photo, nudging):
    """The reference replays the inversion's own path, so it ends at the photograph's latent exactly; nudging
    is undone before decoding.
    """
    from flux.images import fit

    result = edit(nano, DOG, EDITS[:1], **QUICK, photo=photo, nudging=nudging)
    fitted = fit(photo, WIDTH, HEIGHT)
    [through] = nano.decode(nano.encode(fitted), WIDTH, HEIGHT)
    assert difference(result.reference, through) <= 1
    assert rms(result.reference, fitted) < 10
    assert result.edits[0].size == (WIDTH, HEIGHT)


def test_edits_of_a_photograph_take_from_the_inversions_path(nano, photo, monkeypatch):
    """The latents that the reference's passes see are the inverted ones, noise first; edits start from the
    noisiest of them.
    """
    seen, inverted, edits = [], [], []
    euler_step, invert = editing.euler_step, editing.invert

    def recorded_step(model, img, ids, cond, t, t_next, intervention):
        (seen if intervention.keep else edits).append((img, t))
        return euler_step(model, img, ids, cond, t, t_next, intervention)

    def recorded_invert(*given):
        for latent in invert(*given):
            inverted.append(latent)
            yield latent

    monkeypatch.setattr(editing, "euler_step", recorded_step)
    monkeypatch.setattr(editing, "invert", recorded_invert)
    edit(nano, DOG, EDITS[:1], **QUICK, photo=photo)
    levels = nano.schedule(STEPS, WIDTH, HEIGHT)
    assert [t for _, t in seen] == [t for _, t in edits] == levels[:-1]
    for (latent, _), expected in zip(seen, inverted[::-1], strict=True):
        assert torch.equal(latent, expected)
    assert torch.equal(edits[0][0], inverted[-1])


def test_a_photograph_is_inverted_without_a_second_pass(nano, photo, monkeypatch):
    """Guidance away from a negative prompt would lead the inversion astray: one pass for each step."""
    passes = []
    observe = nano.model.observe
    monkeypatch.setattr(nano.model, "observe", lambda *given: passes.append(0) or observe(*given))
    edit(nano, DOG, EDITS[:1], **QUICK, photo=photo)
    assert len(passes) == STEPS + STEPS * 2 * 2


def test_injection_holds_a_photograph(nano, photo):
    """Injecting everywhere stays nearer to the photograph than injecting for the first step alone."""
    everywhere = edit(nano, DOG, EDITS[:1], **{**QUICK, "layers": range(15)}, photo=photo)
    hardly = edit(nano, DOG, EDITS[:1], **{**QUICK, "layers": [14]}, photo=photo, inject_until=0.2)
    near, far = (rms(result.edits[0], result.reference) for result in (everywhere, hardly))
    assert near < far


# ---- which layers


def test_vital_layers_by_name():
    dev, nano = configs["flux-dev"], configs["flux-nano"]
    assert find_vital_layers("auto", dev) == find_vital_layers("stable-flow", dev) == VITAL_LAYERS_DEV
    assert find_vital_layers("auto", nano) == (0, 1, 2, 3, 4)
    assert set(VITAL_LAYERS_DEV) - set(find_vital_layers("stable-flow-code", dev)) == {2}
    assert find_vital_layers([3, 1], nano) == (3, 1)
    assert set(PRESETS) == {"stable-flow", "stable-flow-code"}


def test_vital_layers_from_a_scan(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps({"vital_layers": [2, 5], "top": 2}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (2, 5)


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
    with pytest.raises(InputError, match="vital_layers.json"):
        find_vital_layers(str(path), configs["flux-nano"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG"])
def test_files_that_are_no_text(tmp_path, content):
    (tmp_path / "scan.json").write_bytes(content)
    with pytest.raises(InputError, match="scan.json"):
        find_vital_layers(str(tmp_path / "scan.json"), configs["flux-nano"])


def test_a_name_that_is_no_preset_and_no_file():
    with pytest.raises(InputError, match="'stable-flo', which is no file and no preset"):
        find_vital_layers("stable-flo", configs["flux-nano"])
