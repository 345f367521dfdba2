"""Photographs of any size there and back, and masks in tokens."""

import numpy as np
import pytest
import torch
from helpers.images import noise
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux.editing.photo import TOKEN, Photograph, mask_image, middle, token_mask
from flux.errors import InputError

# ---- sizes


@pytest.mark.parametrize(
    ("size", "shape", "box"),
    [
        ((400, 200), (64, 64), (100, 0, 300, 200)),
        ((200, 401), (64, 32), (0, 150, 200, 250)),
        ((128, 64), (128, 64), (0, 0, 128, 64)),
        ((17, 400), (256, 16), (0, 199, 17, 200)),
    ],
)
def test_the_middle_has_the_shape_that_is_asked_for(size, shape, box):
    assert middle(size, *shape) == box


def test_a_photograph_there_and_back():
    """Its middle in the edit's size; put back, the rest is untouched to the last bit."""
    whole = noise(90, 50)
    photo = Photograph.of(whole, 32, 32)
    assert photo.box == (20, 0, 70, 50)
    assert photo.part.size == (32, 32)
    assert photo.part == whole.crop(photo.box).resize((32, 32), Image.Resampling.LANCZOS)
    back = photo.with_part(Image.new("RGB", (32, 32), "red"))
    assert back.size == whole.size
    assert back.crop(photo.box) == Image.new("RGB", (50, 50), "red")
    for rest in ((0, 0, 20, 50), (70, 0, 90, 50)):
        assert back.crop(rest) == whole.crop(rest)


@pytest.mark.parametrize("size", [(90, 50), (32, 32)], ids=["the whole's", "the edit's"])
def test_a_mask_keeps_the_original_pixels(size):
    photo = Photograph.of(noise(90, 50), 32, 32)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0], size[1] // 2))
    back = photo.with_part(Image.new("RGB", (32, 32), "red"), mask)
    assert back.crop((20, 30, 70, 50)) == photo.whole.crop((20, 30, 70, 50))
    assert back.crop((20, 0, 70, 20)) == Image.new("RGB", (50, 20), "red")


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_photographs_of_less_than_a_token(size):
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels: expected at least 16"):
        Photograph.of(Image.new("RGB", size), 64, 64)


# ---- masks


def test_tokens_with_any_white_may_change():
    """One pixel is enough; greys count as the nearer of black and white."""
    mask = Image.new("RGB", (64, 32))
    mask.putpixel((17, 31), (255, 255, 255))
    mask.paste((120, 120, 120), (32, 0, 48, 16))
    mask.paste((140, 140, 140), (48, 0, 64, 16))
    found = token_mask(mask, [(64, 32)], 64, 32)
    assert found.shape == (1, 8, 1)
    assert found.dtype == torch.bool
    assert found.flatten().tolist() == [False, False, False, True, False, True, False, False]


def test_a_mask_is_cut_as_its_photograph():
    mask = Image.new("L", (400, 200))
    mask.paste(255, (0, 0, 200, 200))
    found = token_mask(mask, [(400, 200), (64, 64)], 64, 64)
    assert found.reshape(4, 4).tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (64, 64)), "black all over"),
        (Image.new("L", (65, 64), 255), "65x64 pixels: expected 64x64 or 400x200"),
    ],
)
def test_masks_that_cannot_be_used(mask, message):
    with pytest.raises(InputError, match=message):
        token_mask(mask, [(64, 64), (400, 200)], 64, 64)


def test_a_mask_with_white_only_where_the_photograph_is_cut_off():
    mask = Image.new("L", (400, 200))
    mask.paste(255, (0, 0, 90, 200))
    with pytest.raises(InputError, match="black all over"):
        token_mask(mask, [(400, 200)], 64, 64)


def test_a_mask_as_a_picture():
    tokens = torch.tensor([True, False, False, False])[:, None]
    picture = np.asarray(mask_image(tokens, 32, 32))
    assert picture.shape == (32, 32)
    assert picture[0, 0] == 255
    assert picture[31, 31] == 0
    assert 0 < picture[8, 16] < 255, "soft edges"


# ---- properties


def sides(tokens: int = 12):
    """Sides of an edit in pixels, whole tokens."""
    return st.integers(1, tokens).map(lambda count: count * TOKEN)


@given(st.integers(1, 300), st.integers(1, 300), sides(), sides())
def test_the_middle_is_inside_and_of_the_shape(across, down, width, height):
    """As large as the image allows, to half a pixel, and in its middle."""
    left, top, right, bottom = middle((across, down), width, height)
    assert 0 <= left < right <= across
    assert 0 <= top < bottom <= down
    assert right - left == across or bottom - top == down
    scale = min(across / width, down / height)
    assert abs((right - left) - max(1, scale * width)) <= 0.5 + 1e-6
    assert abs((bottom - top) - max(1, scale * height)) <= 0.5 + 1e-6
    assert abs(left - (across - right)) <= 1
    assert abs(top - (down - bottom)) <= 1


@given(sides(), sides(), st.data())
def test_a_painted_mask_of_the_edits_size_names_its_tokens(width, height, data):
    """White pixels at any places: exactly the tokens that hold one may change."""
    pixels = st.tuples(st.integers(0, width - 1), st.integers(0, height - 1))
    white = data.draw(st.lists(pixels, min_size=1, max_size=8))
    mask = Image.new("L", (width, height))
    for pixel in white:
        mask.putpixel(pixel, 255)
    found = token_mask(mask, [(width, height)], width, height)
    columns = width // TOKEN
    assert found.shape == (1, columns * (height // TOKEN), 1)
    assert set(found.flatten().nonzero().flatten().tolist()) == {
        y // TOKEN * columns + x // TOKEN for x, y in white
    }


@given(sides(8), sides(8), st.data())
def test_a_mask_of_tokens_comes_back_from_its_image(width, height, data):
    """The middle of a token is white if it may change and has the grey of its neighbours else."""
    count = (width // TOKEN) * (height // TOKEN)
    tokens = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))[:, None]
    image = np.asarray(mask_image(tokens, width, height))
    centres = image[TOKEN // 2 :: TOKEN, TOKEN // 2 :: TOKEN] >= 128
    assert image.shape == (height, width)
    assert centres.flatten().tolist() == tokens.flatten().tolist()
