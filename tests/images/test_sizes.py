"""Sizes by the shape of an image."""

import pytest
from PIL import Image

from flux.images.sizes import natural_size, size_of_ratio


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
def test_natural_size(size, expected):
    """The photograph's shape in the area of 256x256, sides in whole tokens, at least one."""
    assert natural_size(Image.new("RGB", size), 256) == expected


@pytest.mark.parametrize(
    ("ratio", "area", "expected"),
    [
        (1, 1024**2, (1024, 1024)),
        (16 / 9, 1024**2, (1360, 768)),
        (9 / 16, 1024**2, (768, 1360)),
        (3 / 2, 256**2, (304, 208)),
        (1000, 64**2, (2016, 16)),
    ],
)
def test_size_of_a_ratio(ratio, area, expected):
    assert size_of_ratio(ratio, area) == expected
