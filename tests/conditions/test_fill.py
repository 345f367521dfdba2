"""An image and its mask as channels, and what of the image comes back untouched."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux.conditions.fill import fill_condition, fill_images, paste_unmasked, prepare_fill
from flux.errors import InputError
from flux.images.io import to_tensor


def test_each_token_has_its_own_pixels_of_the_mask(encode, image):
    """One white pixel, in row 37 and column 58: token 2, 3, second block down and first across, 5 and 2."""
    dot = Image.new("L", image.size)
    dot.putpixel((58, 37), 255)
    channels = fill_condition(encode, image, dot).channels
    assert channels.shape == (1, 4 * 6, 64 + 256)
    places = channels[0, :, 64:].nonzero()
    assert places.tolist() == [[2 * 6 + 3, (5 * 8 + 2) * 4 + 1]]


def test_what_is_to_be_painted_is_grey(encode, image, mask):
    white = torch.from_numpy(np.asarray(mask) > 127)
    pixels = torch.where(white, 0.0, to_tensor(image))
    assert torch.equal(fill_condition(encode, image, mask).channels[..., :64], encode(pixels[None]))


def test_greys_count_as_the_nearer_of_black_and_white(image, mask):
    soft = mask.point(lambda level: 140 if level else 110)
    assert np.array_equal(fill_images(image, soft)[1], mask)


def test_files_and_arrays(encode, image, mask, tmp_path):
    expected = fill_condition(encode, image, mask).channels
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    files = fill_condition(encode, tmp_path / "image.png", str(tmp_path / "mask.png")).channels
    arrays = fill_condition(encode, np.asarray(image), np.asarray(mask) > 127).channels
    assert torch.equal(files, expected)
    assert torch.equal(arrays, expected)


def test_unmasked_pixels_come_back_exactly(image, mask):
    filled, white = Image.new("RGB", image.size, "red"), np.asarray(mask) > 127
    pasted = np.asarray(paste_unmasked(filled, *fill_images(image, mask)))
    assert np.array_equal(pasted[~white], np.asarray(image)[~white])
    assert (pasted[white] == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("size", "level", "message"),
    [
        ((64, 96), 255, "a mask of 64x96 pixels for an image of 96x64"),
        ((96, 64), 0, "a mask that is black all over"),
    ],
)
def test_a_mask_that_does_not_fit(image, size, level, message):
    with pytest.raises(InputError, match=message):
        fill_images(image, Image.new("L", size, level))


def test_an_image_of_no_whole_tokens():
    with pytest.raises(InputError, match=r"100x64 pixels to fill: .* crop it and its mask to 96x64"):
        fill_images(Image.new("RGB", (100, 64)), Image.new("L", (100, 64), 255))


def test_noise_of_another_size(ae, texts, image, mask):
    with pytest.raises(InputError, match="noise for an image of 64x64 pixels, but one of 96x64"):
        prepare_fill(texts.t5, texts.clip, torch.zeros(1, 16, 8, 8), "", ae, image, mask)
