import pytest
from PIL import Image

from flux.errors import InputError
from flux.studio.painter import board, painted_mask


def test_a_mask_comes_back_as_it_was_painted():
    mask = Image.new("L", (8, 4))
    mask.paste(255, (1, 0, 5, 2))
    image = Image.new("RGB", mask.size, "green")
    assert painted_mask(board(image, mask)).tobytes() == mask.tobytes()
    assert painted_mask(board(image)) is painted_mask(board(image, Image.new("L", (8, 4)))) is None
    assert painted_mask("") is None, "as a browser sends a board that was cleared"


def test_paint_that_a_browser_smooths_at_its_edge():
    """Erased strokes leave hardly visible pixels behind: these are no paint."""
    mask = Image.frombytes("L", (2, 1), bytes([90, 200]))
    assert painted_mask(board(Image.new("RGB", (2, 1)), mask)).tobytes() == bytes([0, 255])


@pytest.mark.parametrize("value", ["x", {"painted": 7}, {"painted": "data:image/png;base64,AAAA"}])
def test_a_value_that_no_page_sends(value):
    with pytest.raises(InputError, match="paint it again"):
        painted_mask(value)
