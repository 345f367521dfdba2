"""Sizes by the shape of an image."""

import pytest
from PIL import Image

from flux.images.sizes import natural_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((256, 256), (256, 256)),
        ((4000, 3000), (288, 224)),
        ((30, 40), (224, 288)),
        ((1920, 1080), (336, 192)),
        ((20, 4000), (16, 3616)),
    ],
)
def test_sides_are_the_photographs_shape_in_the_models_area(size, expected):
    """The photograph's shape in the area of 256x256, sides in whole tokens, at least one."""
    assert natural_size(Image.new("RGB", size), 256) == expected
