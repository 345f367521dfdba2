"""From settings to the images that steer a run, their sizes, and the condition of a pass."""

import numpy as np
import pytest
from helpers.condition_models import make_steered_folder, save_image, save_mask, steered_pipe
from PIL import Image

from flux.conditions.images import read_conditions, sized
from flux.errors import InputError
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, SessionSettings
from flux.settings.edits import EditSettings


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """The tiny models are in the table, and the current folder is a new one."""
    make_steered_folder(monkeypatch, tmp_path)


def settings(model: str, **fields) -> GenerateSettings:
    return GenerateSettings(model=model, prompts=["a dog"], **fields)


def resolved(given):
    """The settings that run."""
    return resolve(sized(given, read_conditions(given)))


# ---- sizes


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "tiny-kontext", "context": "wide.png"}, (96, 48)),
        ({"model": "tiny-kontext", "context": ["a.png", "wide.png"]}, (64, 64)),
        ({"model": "tiny-canny", "control": "wide.png"}, (96, 48)),
        ({"model": "tiny-canny", "control": "wide.png", "width": 128}, (128, 64)),
        ({"model": "tiny-canny", "control": "wide.png", "height": 32}, (64, 32)),
        ({"model": "flux-dev-canny", "control": "cinema.png"}, (1584, 656)),
        ({"model": "flux-dev-canny", "control": "cinema.png", "width": 3000}, (3000, 1255)),
        ({"model": "tiny-fill", "fill": "wide.png", "outpaint": 0.5}, (256, 128)),
        ({"model": "tiny-fill", "fill": "a.png", "mask": "mask.png"}, (64, 64)),
        ({"model": "tiny-fill", "fill": "a.png", "mask": "mask.png", "width": 40}, (32, 64)),
        ({"model": "tiny-kontext", "context": "wide.png", "width": 80, "height": 32}, (80, 32)),
        ({"model": "tiny"}, (None, None)),
    ],
)
def test_an_image_that_steers_may_set_the_size(fields, expected, tmp_path):
    save_image(tmp_path / "cinema.png", 2390, 1000)
    given = settings(**fields)
    found = sized(given, read_conditions(given))
    assert (found.width, found.height) == expected


def test_an_aspect_ratio_comes_first():
    given = SessionSettings(model="tiny-kontext", context="a.png", aspect_ratio="2:1")
    found = sized(given, read_conditions(given))
    assert (found.width, found.height) == (80, 32)
    with pytest.raises(InputError, match="Got the aspect ratio 'wide'"):
        sized(given.model_copy(update={"aspect_ratio": "wide"}), read_conditions(given))


def test_an_aspect_ratio_beside_images_of_their_own_shape():
    """The image to fill keeps its shape. A control image must have that of the ratio."""
    given = SessionSettings(model="tiny-fill", fill="wide.png", outpaint=0.5, aspect_ratio="1:1")
    found = sized(given, read_conditions(given))
    assert (found.width, found.height) == (256, 128)
    given = SessionSettings(model="tiny-canny", control="wide.png", aspect_ratio="1:1")
    with pytest.raises(InputError, match="Got a control image of 128x64 pixels for an image of 64x64"):
        sized(given, read_conditions(given))


def test_images_in_place_of_files():
    """The names of the settings are not read."""
    given = settings("tiny-fill", fill="none.png", mask="none.png")
    image, mask = Image.open("a.png"), Image.open("mask.png")
    filled = read_conditions(given, {"fill": image, "mask": mask}).filled
    assert filled is not None
    assert np.array_equal(filled[0], image)
    assert np.array_equal(filled[1], mask)


# ---- passes


@pytest.mark.parametrize(
    ("fields", "channels", "context"),
    [
        ({"model": "tiny-kontext", "context": ["a.png", "wide.png"]}, 0, 16 + 18),
        ({"model": "tiny-fill", "fill": "a.png", "mask": "mask.png"}, 320, 0),
        ({"model": "tiny-canny", "control": "a.png"}, 64, 0),
    ],
)
def test_each_kind_changes_the_image(nano, fields, channels, context):
    """A pass has what the kind adds, and another image leads to another result."""
    made, field = [], next(name for name in ("context", "fill", "control") if name in fields)
    for changes in ({}, {field: "b.png"}):
        given = settings(**fields | changes)
        images = read_conditions(given)
        run = resolve(sized(given, images))
        pipe = steered_pipe(nano, given.model).steered(images, run)
        condition = pipe.condition(["a dog"], 3.5).condition
        assert (0 if condition.channels is None else condition.channels.shape[2]) == channels
        if not changes:
            assert (0 if condition.context is None else condition.context.shape[1]) == context
        made.append(pipe.generate(["a dog"], [0], progress=False, **run.sampling())[0])
    assert made[0].size == (64, 64)
    assert np.abs(np.subtract(*(np.asarray(each, dtype=float)[:, 32:] for each in made))).max() > 1


def test_unmasked_pixels_stay_exactly(nano):
    pixels = []
    for paste_back in (True, False):
        given = settings("tiny-fill", fill="a.png", mask="mask.png", paste_back=paste_back)
        images = read_conditions(given)
        run = resolve(sized(given, images))
        pipe = steered_pipe(nano, "tiny-fill").steered(images, run)
        [made] = pipe.generate(["a dog"], [0], progress=False, **run.sampling())
        pixels.append(np.asarray(made))
    original = np.asarray(Image.open("a.png"))
    assert np.array_equal(pixels[0][:, :32], original[:, :32])
    assert not np.array_equal(pixels[1][:, :32], original[:, :32])
    assert np.array_equal(pixels[0][:, 32:], pixels[1][:, 32:])


def test_without_images_nothing_changes(nano):
    given = settings("flux-nano")
    assert nano.steered(read_conditions(given), resolve(given)) is nano


# ---- wrong input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "flux-dev", "context": "a.png"}, "Got context for flux-dev, .*: choose flux-dev-kontext"),
        ({"model": "tiny-canny", "fill": "a.png"}, "Got fill for tiny-canny, which takes control"),
        ({"model": "flux-dev-fill"}, "Got no fill for flux-dev-fill, which needs it"),
        ({"model": "flux-nano", "redux": "a.png"}, "Got redux for flux-nano, which has no Redux adapter"),
        ({"model": "tiny-fill", "fill": "a.png"}, "neither mask nor outpaint"),
        ({"model": "tiny-fill", "fill": "a.png", "mask": "mask.png", "outpaint": 1}, "mask and outpaint"),
        ({"model": "flux-nano", "mask": "mask.png"}, "Got mask without fill"),
        ({"model": "tiny-fill", "fill": "wide.png", "mask": "mask.png"}, "make them of one size"),
        ({"model": "tiny-fill", "fill": "a.png", "mask": "black.png"}, "black all over"),
        (
            {"model": "tiny-canny", "control": "wide.png", "width": 64, "height": 64},
            "Got a control image of 128x64 pixels for an image of 64x64",
        ),
        ({"model": "tiny-kontext", "context": "notes.txt"}, "notes.txt, not a readable image"),
        ({"model": "tiny-kontext", "context": ["a.png", "lost.png"]}, "lost.png, which is not there"),
    ],
)
def test_wrong_images(fields, message, tmp_path):
    save_mask(tmp_path / "black.png", white=False)
    (tmp_path / "notes.txt").write_text("a dog")
    with pytest.raises(InputError, match=message) as error:
        resolved(settings(**fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": "auto"}, 'Got fill with mask "auto": give an image'),
        ({"mask": "mask.png", "photo": "a.png"}, "Got fill and photo: give one image"),
    ],
)
def test_wrong_images_of_edits(fields, message):
    given = EditSettings(model="tiny-fill", prompt="a dog", edits=["a cat"], fill="a.png", **fields)
    with pytest.raises(InputError, match=message):
        resolved(given)
