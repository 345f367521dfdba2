"""Images that a program hands over: read as the same image is read from a file."""

import numpy as np
import pytest
from helpers import images
from helpers.images import noise
from PIL import ExifTags, Image

from flux.errors import InputError
from flux.images.io import as_pil, as_rgb, read_image


def same(a: Image.Image, b: Image.Image) -> bool:
    return images.same(a, b) and not a.info


@pytest.mark.parametrize("form", ["array", "grey", "transparent", "image", "path"])
def test_images_of_a_program_are_read_as_files_are(tmp_path, form):
    image = {"grey": noise().convert("L"), "transparent": noise().convert("RGBA")}.get(form, noise())
    if form == "transparent":
        image.putalpha(Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48)))
    image.save(tmp_path / "image.png")
    given = {"image": image, "path": tmp_path / "image.png"}.get(form, np.asarray(image))
    assert same(as_rgb(given), read_image(tmp_path / "image.png"))


def test_a_photograph_of_a_camera_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise().save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert same(as_rgb(image), read_image(tmp_path / "turned.png"))


def test_an_array_of_truth_values_is_black_and_white():
    assert np.array_equal(np.asarray(as_pil(np.array([[True, False]]))), [[255, 0]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3)), "type float64 and shape 4x4x3: expected levels 0..255 of type uint8"),
        (np.zeros((3, 5, 5), np.uint8), "shape 3x5x5"),
        (None, "Got NoneType, expected a path, a PIL image or a NumPy array"),
        (Image.new("F", (4, 4)), "floating-point numbers"),
        ("/nowhere.png", "is not there"),
    ],
)
def test_what_is_no_image_of_a_program(given, message):
    with pytest.raises(InputError, match=message):
        as_rgb(given)
