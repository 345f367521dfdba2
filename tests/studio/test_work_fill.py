"""Images that are filled or continued, and edits by instruction, as the studio runs and records them."""

import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
from helpers.condition_models import SPECS
from helpers.conditions import draw
from helpers.steered_studio import make_steered_studio
from helpers.studio import ROOT, assert_same_image, finish
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image
from flux.specs import configs
from flux.studio.forms import fill_settings, generate_settings, instruct_settings
from flux.studio.repeat import as_command
from flux.studio.visits import read_run
from flux.studio.work.fill import before, run_fill
from flux.studio.work.generate import run_generate

AROUND = {
    "prompt": "a dog",
    "outpaint": True,
    "left": 0.5,
    "right": 0,
    "above": 0,
    "below": 0,
    "overlap": 0.1,
}


@pytest.fixture
def studio_of(monkeypatch, tmp_path):
    """Makes a studio of one of the tiny models."""
    for name, spec in SPECS.items():
        monkeypatch.setitem(configs, name, spec)
    return lambda name: make_steered_studio(name, tmp_path)


def assert_command_repeats(run, tmp_path, monkeypatch):
    """The copied command, from a folder with the run's inputs and the weights."""
    here = tmp_path / "here"
    shutil.copytree(run.folder, here, ignore=shutil.ignore_patterns("0*", "run.json"))
    shutil.copy(tmp_path / run.settings.weights, here)
    program, *arguments = shlex.split(as_command(run.settings))[1:]
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--output_dir", "out"])
    runpy.run_path(str(ROOT / program), run_name="__main__")
    assert_same_image(run.images["000"], here / "out" / "000.png")


def test_a_mask_is_filled_and_all_else_stays(studio_of, tmp_path, monkeypatch):
    studio, image, mask = studio_of("tiny-fill"), draw(70, 64), Image.new("L", (35, 32))
    mask.paste(255, (0, 0, 10, 32))
    settings = fill_settings(studio, {"prompt": "a dog"}, image.size)
    run = finish(run_fill(studio, studio.sessions.of("a"), settings, image, mask))
    made, kept = np.asarray(read_image(run.images["000"])), np.asarray(Image.open(run.folder / "mask.png"))
    assert np.array_equal(np.asarray(read_image(run.folder / "fill.png")), np.asarray(image)[:, 3:67])
    assert (made == np.asarray(image)[:, 3:67]).all(axis=2)[kept == 0].all()
    assert (made != np.asarray(image)[:, 3:67]).any(axis=2)[kept > 0].mean() > 0.9
    assert before(run) == (run.folder / "fill.png", run.folder / "mask.png")
    assert_command_repeats(run, tmp_path, monkeypatch)


def test_an_image_is_continued(studio_of, tmp_path, monkeypatch):
    studio, image = studio_of("tiny-fill"), draw(64, 48)
    run = finish(run_fill(studio, studio.sessions.of("a"), fill_settings(studio, AROUND, image.size), image))
    made = np.asarray(read_image(run.images["000"]))
    assert made.shape == (64, 96, 3)
    framed, mask = (np.asarray(Image.open(path)) for path in before(read_run(run.folder)))
    assert np.array_equal(made[mask == 0], framed[mask == 0])
    # The frame is rounded up below; the mask reaches into the image by a tenth of its sides.
    assert np.array_equal(framed[:43, 38:], np.asarray(image)[:43, 6:])
    assert (mask == 0).sum() == 43 * 58
    assert_command_repeats(run, tmp_path, monkeypatch)


def test_an_instruction_with_two_images(studio_of, tmp_path, monkeypatch):
    studio, images = studio_of("tiny-kontext"), [draw(64, 64), draw(32, 64, seed=1)]
    form = {"prompt": "add a hat", "context": ["a", "b"], "reference_strength": 1.2, "context_every": 2.0}
    settings, session = instruct_settings(studio, form), studio.sessions.of("a")
    run = finish(run_generate(studio, session, settings, steering={"context": images}))
    assert run.settings.context == ("context_0.png", "context_1.png")
    assert run.settings.context_every == 2
    assert np.array_equal(np.asarray(read_image(run.folder / "context_1.png")), np.asarray(images[1]))
    plain = finish(run_generate(studio, session, generate_settings(studio, {"prompt": "add a hat"})))
    assert (np.asarray(read_image(run.images["000"])) != np.asarray(read_image(plain.images["000"]))).any()
    assert_command_repeats(run, tmp_path, monkeypatch)


def test_what_cannot_be_used(studio_of):
    fill, kontext = studio_of("tiny-fill"), studio_of("tiny-kontext")
    for change, message in (
        ({"left": 0}, "Got no border and no mask"),
        ({"left": "wide"}, "left: expected a number from 0 to 1"),
        ({"above": float("nan")}, "above: expected a number"),
        ({"overlap": 1}, "overlap: expected a number from 0 to 0.25"),
        ({"count": 99}, "count: expected an integer"),
    ):
        with pytest.raises(InputError, match=message):
            fill_settings(fill, {**AROUND, **change}, (64, 64))
    for context, message in (([], "Got no context image"), (["a"] * 9, "Got 9 context images: give 1 to 3")):
        with pytest.raises(InputError, match=message):
            instruct_settings(kontext, {"prompt": "a", "context": context, "reference_strength": 1})
    with pytest.raises(InputError, match="reference_strength: expected a number from 0 to 2"):
        instruct_settings(kontext, {"prompt": "a", "context": ["a"], "reference_strength": True})
    with pytest.raises(InputError, match="which needs it"):
        generate_settings(fill, {"prompt": "a dog"})


def test_large_images_are_scaled_until_they_fit(studio_of):
    studio = studio_of("tiny-fill")
    limits = studio.limits
    for size in ((2000, 500), (500, 2000), (1000, 1000), (90, 90)):
        for borders in ((0.5, 0.5, 0.5, 0.5), (1, 0, 0, 0), (0, 0, 0, 0.05)):
            how = dict(zip(("left", "right", "above", "below"), borders))
            form = {**AROUND, **how}
            assert fill_settings(studio, form, size).width <= limits.side  # or it is refused
    assert limits.fill_size((64, 48)) == (64, 48)
    assert limits.fill_size((1280, 320)) == (128, 32)
