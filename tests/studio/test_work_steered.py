"""Edits, scans, films and LoRAs of models that need an image, as the studio runs and records them."""

from pathlib import Path

import numpy as np
import pytest
from helpers.condition_models import SPECS, save_image
from helpers.steered_studio import make_steered_studio
from helpers.studio import assert_same_image, finish, run_demo
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.specs import configs
from flux.studio.forms import edit_settings, film_settings, scan_settings
from flux.studio.work.edit import run_edit, run_reference
from flux.studio.work.film import run_film
from flux.studio.work.generate import steering_images
from flux.studio.work.scan import Vital, run_scan, steered_scan

GIVEN = {"tiny-canny": "control", "tiny-fill": "fill"}
EDIT = {"prompt": "a dog", "edits": "a cat", "layers": {"on": [0, 2]}}


@pytest.fixture(params=GIVEN)
def studio(request, monkeypatch, tmp_path):
    for name, spec in SPECS.items():
        monkeypatch.setitem(configs, name, spec)
    return make_steered_studio(request.param, tmp_path)


def images_for(studio, seed=0):
    """An image and its mask, as a visitor gives them."""
    given = {GIVEN[studio.defaults.model]: Image.open(save_image(studio.folder / "given.png", seed=seed))}
    if "fill" in given:
        given["mask"] = Image.new("L", (32, 32))
        given["mask"].paste(255, (0, 0, 16, 32))
    return given


def with_names(form, given):
    return {**form, **dict.fromkeys(given, "held")}


def test_demo_4_repeats_an_edit(studio, tmp_path):
    given = images_for(studio)
    settings = edit_settings(studio, with_names(EDIT, given))
    steering = steering_images(settings, given)
    made = finish(run_edit(studio, studio.sessions.of("a"), settings, steering=steering))
    weights = str(tmp_path / made.settings.weights)
    out = run_demo("demo_4_edit", made.record, tmp_path / "again", weights=weights)
    for name in ("reference", "edit_0"):
        assert_same_image(made.images[name], out / f"{name}.png")
    if "fill" in given:  # reference and edit keep what the mask does not say
        image, edit = (
            np.asarray(read_image(path)) for path in (made.folder / "fill.png", out / "edit_0.png")
        )
        assert np.array_equal(edit[:, 32:], image[:, 32:])
        assert not np.array_equal(edit[:, :32], image[:, :32])


def test_a_reference_is_kept_for_its_own_image(studio):
    session, kept = studio.sessions.of("a"), []
    for seed in (0, 0, 1):
        given = images_for(studio, seed)
        settings = edit_settings(studio, with_names(EDIT, given))
        list(run_reference(studio, session, settings, steering=steering_images(settings, given)))
        kept.append(studio.engine.kept)
    assert kept[0] is kept[1]
    assert kept[1] is not kept[2]


def test_a_scan_belongs_to_its_image(studio):
    session, folders = studio.sessions.of("a"), []
    for seed in (0, 1, 0):
        given = images_for(studio, seed)
        form = with_names({"prompts": "a dog", "layers": {"on": [0, 3]}, "top": 1}, given)
        settings = steered_scan(scan_settings(studio, form), given)
        *_, vital = [update.result for update in run_scan(studio, session, settings) if update.result]
        assert isinstance(vital, Vital)
        folders.append(Path(settings.output_dir))
    assert folders[0] == folders[2] != folders[1]
    first, second = (read_image(folder / "prompt_000" / "reference.png") for folder in folders[:2])
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    assert str(folders[0].parent) not in (folders[0] / "vital_layers.json").read_text()


def test_a_film_shows_its_image(studio, tmp_path):
    given = images_for(studio)
    settings = film_settings(studio, with_names({"prompt": "a dog", "layers": {"on": [1]}}, given))
    steering = steering_images(settings, given)
    made = finish(run_film(studio, studio.sessions.of("a"), settings, steering))
    out = run_demo(
        "demo_1_layer", made.record, tmp_path / "out", weights=str(tmp_path / made.settings.weights)
    )
    for sheet in ("steps", "layers"):
        assert_same_image(made.folder / f"{sheet}.png", out / f"{sheet}.png")


def test_an_image_is_needed(studio):
    with pytest.raises(InputError, match="which needs it"):
        edit_settings(studio, EDIT)
    with pytest.raises(InputError, match="which needs it"):
        scan_settings(studio, {"prompts": "a dog", "layers": {"on": [0]}})
