"""Canvases and masks of images that are continued beyond their edges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux.errors import InputError
from flux.images.outpaint import outpaint


def image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), dtype=np.uint8))


def test_a_border_on_the_right():
    """A quarter of 128 pixels, and a mask that begins a sixteenth of the width inside the image."""
    canvas, mask = outpaint(image(128, 64), (0, 0.25, 0, 0), overlap=1 / 16)
    assert canvas.size == mask.size == (160, 64)
    white = np.asarray(mask)
    assert not white[:, :120].any()
    assert (white[:, 120:] == 255).all()
    assert canvas.crop((0, 0, 128, 64)) == image(128, 64)
    assert not np.asarray(canvas)[:, 128:].any()


def test_a_border_on_all_sides():
    canvas, mask = outpaint(image(64, 64), 0.5, overlap=0)
    assert canvas.size == (128, 128)
    assert canvas.crop((32, 32, 96, 96)) == image(64, 64)
    expected = np.full((128, 128), 255)
    expected[32:96, 32:96] = 0
    assert np.array_equal(mask, expected)


def test_rounding_goes_to_the_larger_border():
    """100 and 10 pixels of border at most become 128: 18 more than asked for."""
    canvas, mask = outpaint(image(100, 32), (0.1, 0, 0, 0), overlap=0)
    assert canvas.size == (128, 32)
    assert canvas.crop((28, 0, 128, 32)) == image(100, 32)
    assert np.asarray(mask)[0].tolist() == [255] * 28 + [0] * 100


FRACTIONS = st.floats(0, 1)


@settings(max_examples=60)
@given(
    sides=st.tuples(st.integers(16, 99), st.integers(16, 99)),
    borders=st.tuples(FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS).filter(any),
    overlap=st.floats(0, 0.25),
)
def test_what_the_mask_leaves_is_the_image(sides, borders, overlap):
    """At any borders: whole sides, all that is asked for, and no pixel outside the mask but the image's."""
    source = image(*sides)
    canvas, mask = outpaint(source, borders, overlap)
    assert canvas.width % 32 == canvas.height % 32 == 0
    kept = np.asarray(mask) == 0
    assert np.asarray(canvas)[kept].min() > 0
    grown = [round(own * part) for own, part in zip((sides[0],) * 2 + (sides[1],) * 2, borders)]
    assert canvas.width >= sides[0] + grown[0] + grown[1]
    assert canvas.height >= sides[1] + grown[2] + grown[3]
    assert kept.sum() >= (sides[0] - 2 * round(sides[0] * overlap)) * (
        sides[1] - 2 * round(sides[1] * overlap)
    )


@pytest.mark.parametrize(
    ("borders", "overlap", "message"),
    [
        (0.0, 0.01, "expected a border on a side at least"),
        ((-0.1, 0.5, 0, 0), 0.01, "no negative fraction"),
        (0.5, -0.1, "no negative fraction"),
        (0.5, 0.5, "which leaves nothing of the image"),
    ],
)
def test_wrong_borders_are_refused(borders, overlap, message):
    with pytest.raises(InputError, match=message):
        outpaint(image(64, 64), borders, overlap)
