"""A map as channels, from images of the right shape and of others."""

import pytest
import torch
from helpers.conditions import draw
from PIL import Image

from flux.conditions.control import control_condition, prepare_control
from flux.errors import InputError
from flux.images.io import to_tensor


def test_an_image_is_scaled_to_the_size_of_the_result(encode, image, tmp_path):
    channels = control_condition(encode, image, 96, 64).channels
    assert torch.equal(channels, encode(to_tensor(image)[None]))
    large = draw(192, 128)
    large.save(tmp_path / "large.png")
    small = large.resize((96, 64), Image.Resampling.LANCZOS)
    scaled = control_condition(encode, tmp_path / "large.png", 96, 64).channels
    assert torch.equal(scaled, encode(to_tensor(small)[None]))


def test_the_map_is_drawn_of_the_scaled_image(encode):
    seen = []

    def negative(pixels):
        seen.append(pixels.shape)
        return -pixels

    large = draw(192, 128)
    small = to_tensor(large.resize((96, 64), Image.Resampling.LANCZOS))[None]
    assert torch.equal(control_condition(encode, large, 96, 64, negative).channels, encode(-small))
    assert seen == [(1, 3, 64, 96)]


def test_an_image_of_another_shape(encode, ae, texts, image):
    """Refused, but squeezed by upstream's call."""
    with pytest.raises(InputError, match="control image of 96x64 pixels for an image of 64x64"):
        control_condition(encode, image, 64, 64)
    given = prepare_control(texts.t5, texts.clip, torch.zeros(2, 16, 8, 8), ["", ""], ae, None, image)
    assert given["img_cond"].shape == (2, 16, 64)
    squeezed = encode(to_tensor(image.resize((64, 64), Image.Resampling.LANCZOS))[None])
    assert torch.equal(given["img_cond"][1:], squeezed)


@pytest.mark.parametrize("image", ["gone.png", 5])
def test_what_is_not_an_image(encode, image):
    with pytest.raises(InputError, match=r"gone\.png, which is not there|Got int"):
        control_condition(encode, image, 64, 64)
