import pytest
from helpers.studio import finish
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_metadata
from flux.studio.forms import edit_settings, generate_settings
from flux.studio.sessions import Sessions, read_back
from flux.studio.visits import EXAMPLE, continue_visit, pack_mask, shown_run, unpack_mask
from flux.studio.work.edit import run_edit
from flux.studio.work.generate import run_generate

SECRET = "0123456789abcdef" * 2


def test_a_visit_goes_on_after_a_reload_and_after_a_restart(studio):
    session = continue_visit(studio.sessions, "page", SECRET)
    settings = generate_settings(studio, {"prompt": "a dog", "count": 2})
    made = finish(run_generate(studio, session, settings))
    assert continue_visit(studio.sessions, "page opened again", SECRET).runs is session.runs
    restarted = continue_visit(Sessions(studio.sessions.folder), "later", SECRET)
    [run] = restarted.runs
    assert (run.images, run.captions, run.settings) == (made.images, made.captions, made.settings)
    assert not continue_visit(studio.sessions, "somebody else", SECRET[::-1]).runs


@pytest.mark.parametrize("wrong", ["", "../../etc", "0" * 31, SECRET.upper()])
def test_what_is_no_secret_starts_no_visit(studio, wrong):
    session = studio.sessions.of("page")
    folder = session.folder
    assert continue_visit(studio.sessions, "page", wrong) is session
    assert session.folder == folder


def test_addresses_do_not_tell_the_secret(studio):
    assert SECRET not in str(continue_visit(studio.sessions, "page", SECRET).folder)


def test_an_image_carries_its_mask(studio):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 0, 40, 20))
    form = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0]}}
    made = finish(run_edit(studio, studio.sessions.of("a"), edit_settings(studio, form), mask=mask))
    _, said = read_back(made.images["edit_0"])
    assert unpack_mask(said["mask"]).tobytes() == mask.tobytes()
    assert len(said["mask"]) < 1000


def test_masks_that_are_none(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for wrong in ("x", "AAAA", pack_mask(Image.new("L", (11, 10)))):
        with pytest.raises(InputError, match="paint the mask again"):
            unpack_mask(wrong)
    assert unpack_mask(pack_mask(Image.new("L", (10, 10)))).size == (10, 10)


def test_the_example_is_a_run_of_its_own_prompts():
    run = shown_run(EXAMPLE)
    entries = run.settings.entries
    assert list(run.images) == ["reference", *(f"edit_{number}" for number in range(len(entries)))]
    assert list(run.captions.values()) == [run.settings.prompt, *(entry.prompt for entry in entries)]
    for name, path in run.images.items():
        about = read_metadata(path)
        assert (about["prompt"], about["seed"]) == (run.captions[name], run.settings.seed)
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir()) < 100_000
