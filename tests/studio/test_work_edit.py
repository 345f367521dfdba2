import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.studio import assert_same_image, finish, run_demo
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.settings.edits import EditSettings
from flux.settings.files import read_settings
from flux.specs import configs
from flux.studio.forms import edit_settings
from flux.studio.work.edit import FOUND_MASK, known_layers, run_edit, run_reference


def test_demo_4_repeats_an_edit_of_a_photograph(studio, tmp_path, photo):
    form = {"prompt": "a dog", "edits": "a cat\n> a white cat", "layers": {"on": [0, 3]}}
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    made = finish(run_edit(studio, studio.sessions.of("a"), edit_settings(studio, form), photo, mask))
    assert list(made.images) == ["reference", "edit_0", "edit_1"]
    out = run_demo("demo_4_edit", made.record, tmp_path / "again")
    for name, path in made.images.items():
        assert_same_image(path, out / f"{name}.png")
    # The archive is taken home, and runs there.
    with zipfile.ZipFile(studio.sessions.of("a").zip()) as archive:
        archive.extractall(tmp_path / "home")
    settings = read_settings(EditSettings, tmp_path / "home" / "000_edit" / "run.json")
    assert Path(settings.photo).parent == tmp_path / "home" / "000_edit" == Path(settings.mask).parent


def test_a_kept_reference_is_used_again(studio):
    form = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0, 1, 3]}}
    session = studio.sessions.of("a")
    first = finish(run_edit(studio, session, edit_settings(studio, form)))
    kept = studio.engine.kept
    fewer = finish(run_edit(studio, session, edit_settings(studio, {**form, "layers": {"on": [1]}})))
    assert studio.engine.kept is kept
    assert_same_image(first.images["reference"], fewer.images["reference"])
    assert first.images["edit_0"].read_bytes() != fewer.images["edit_0"].read_bytes()
    finish(run_edit(studio, session, edit_settings(studio, {**form, "seed": 9})))
    assert studio.engine.kept is not kept


def test_an_edit_is_the_same_whatever_was_asked_before(studio, photo):
    form = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0, 1]}, "guidance": 3}
    session = studio.sessions.of("a")
    for changes, image in (({"guidance": 7}, None), ({"paste_back": True}, photo)):
        studio.engine.kept = None
        alone = finish(run_edit(studio, session, edit_settings(studio, form), image))
        finish(run_edit(studio, session, edit_settings(studio, {**form, **changes}), image))
        after = finish(run_edit(studio, session, edit_settings(studio, form), image))
        for name in ("reference", "edit_0"):
            assert_same_image(alone.images[name], after.images[name])


def test_edits_are_refused_before_their_reference_is_made(studio):
    """Words beyond the encoder's length: the edit reads as its reference."""
    long = "a dog and " * 20
    form = {"prompt": f"{long} a cat", "edits": f"{long} an owl", "layers": {"on": [0]}}
    with pytest.raises(InputError, match="same tokens"):
        finish(run_edit(studio, studio.sessions.of("a"), edit_settings(studio, form)))
    assert studio.engine.kept is None


def test_a_reference_alone_is_kept_and_not_saved(studio):
    form = {"prompt": "a dog", "edits": "-", "layers": {"on": [0]}}
    session = studio.sessions.of("a")
    *_, last = run_reference(studio, session, edit_settings(studio, form))
    assert last.result is studio.engine.kept.reference.image
    assert not session.runs


def test_layers_that_are_on_at_first(studio):
    assert known_layers(studio)[0] == configs["flux-nano"].vital_layers


def test_the_masks_that_were_found_are_saved(studio):
    """Beside their edits; a painted mask is not found, and nothing is where the whole image may change."""
    form = {
        "prompt": "a dog on the grass",
        "edits": "a cat on the grass",
        "layers": {"on": [0, 4]},
        "seed": 7,
    }
    form |= {"width": 256, "height": 256, "num_steps": 4}
    session = studio.sessions.of("a")
    made = finish(run_edit(studio, session, edit_settings(studio, form)))
    mask = np.asarray(Image.open(made.folder / FOUND_MASK.format("edit_0")))
    assert mask.shape == (256, 256)
    assert 0 < (mask > 127).mean() < 0.9
    kept = mask == 0
    reference, edit = (np.asarray(read_image(made.images[name])) for name in ("reference", "edit_0"))
    changes = np.abs(reference.astype(int) - edit).mean(axis=2)
    assert changes[mask > 127].mean() > 5 * changes[kept].mean()
    painted = finish(run_edit(studio, session, edit_settings(studio, form), mask=Image.fromarray(mask)))
    assert not list(painted.folder.glob(FOUND_MASK.format("*")))
