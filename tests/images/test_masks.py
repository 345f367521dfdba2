"""Painted masks: what each kind of file means."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux.errors import InputError, InputWarning
from flux.images.masks import read_mask

SIZE = (64, 48)
BOX = (10, 8, 29, 39)  # of the paint, both ends included


def layer(colour, background=(255, 255, 255, 0), mode="RGBA") -> Image.Image:
    """Paint of a colour in BOX, on a background."""
    image = Image.new(mode, SIZE, background)
    ImageDraw.Draw(image).rectangle(BOX, fill=colour)
    return image


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def hole() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(layer(0, 255, "L"))
    return image


def keyed() -> Image.Image:
    """White paint on a grey that the file calls transparent."""
    image = layer(255, 200, "L")
    image.info["transparency"] = 200
    return image


def palette() -> Image.Image:
    image = layer(1, 0, "P")
    image.putpalette([255, 255, 255, 250, 250, 250])
    image.info["transparency"] = 0
    return image


MASKS = {
    "black and white": layer(255, 0, "L"),
    "bilevel": layer(1, 0, "1"),
    "16 bits": Image.fromarray(np.asarray(layer(255, 0, "L")).astype(np.uint16) * 257),
    "red on black": layer((255, 0, 0), (0, 0, 0), "RGB"),
    "opaque alpha": layer((255, 255, 255, 255), (0, 0, 0, 255)),
    "white on transparent white": layer((255, 255, 255, 255)),
    "white on transparent black": layer((255, 255, 255, 255), (0, 0, 0, 0)),
    "blue on transparent": layer((30, 40, 255, 255)),
    "black on transparent": layer((0, 0, 0, 255)),
    "grey with alpha": layer((255, 255), (255, 0), "LA"),
    "transparent grey": keyed(),
    "transparent colour of a palette": palette(),
    "a photo with a hole": hole(),
}


@pytest.mark.parametrize("name", MASKS)
def test_what_is_painted_may_change(name, tmp_path):
    MASKS[name].save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png")
    assert found.mode == "L"
    assert np.array_equal(np.asarray(found) >= 128, np.asarray(layer(255, 0, "L")) > 0)


def test_black_paint_beside_white_is_kept(tmp_path):
    image = layer((255, 255, 255, 255))
    ImageDraw.Draw(image).rectangle((40, 0, 63, 47), fill=(0, 0, 0, 255))
    image.save(tmp_path / "mask.png")
    found = np.asarray(read_mask(tmp_path / "mask.png")) >= 128
    assert np.array_equal(found, np.asarray(layer(255, 0, "L")) > 0)


def test_faint_paint_is_not_painted(tmp_path):
    layer((255, 255, 255, 100)).save(tmp_path / "mask.png")
    assert np.asarray(read_mask(tmp_path / "mask.png")).max() < 128


def test_nothing_painted_is_black(tmp_path):
    Image.new("RGBA", SIZE, (255, 255, 255, 0)).save(tmp_path / "mask.png")
    assert np.asarray(read_mask(tmp_path / "mask.png")).max() == 0


def test_a_mask_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    layer(255, 0, "L").save(tmp_path / "mask.png", exif=exif)
    assert read_mask(tmp_path / "mask.png").size == SIZE[::-1]


def test_a_mask_is_bare_pixels(tmp_path):
    """Who publishes a run need not publish where its mask was drawn."""
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    layer(255, 0, "L").save(tmp_path / "mask.png", exif=exif, dpi=(300, 300))
    assert not read_mask(tmp_path / "mask.png").info


def test_files_that_are_no_masks_are_named(tmp_path):
    with pytest.raises(InputError, match=r"mask\.png"):
        read_mask(tmp_path / "mask.png")


def test_a_photograph_as_mask_is_told(tmp_path):
    """Bright opaque colours count as white, so much of a photograph would. Here it is three gradients."""
    levels = np.linspace(0, 255, 64, dtype=np.uint8)
    ramp = np.stack(np.broadcast_arrays(levels[:, None], levels[None], levels[::-1, None]), axis=-1)
    Image.fromarray(ramp).save(tmp_path / "photo.png")
    with pytest.warns(InputWarning, match="photo.png looks like a photograph, not like a mask"):
        read_mask(tmp_path / "photo.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("quality", [30, 60, 95])
def test_paint_in_a_jpeg_is_no_photograph(tmp_path, quality):
    """JPEG blurs the edges of paint, and makes colours of its own there."""
    image = Image.new("RGB", (256, 192))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 150, 100), fill=(255, 0, 0))
    draw.ellipse((120, 70, 200, 150), fill=(0, 255, 255))
    image.save(tmp_path / "mask.jpg", quality=quality)
    Image.linear_gradient("L").save(tmp_path / "soft.png")
    for name in ("mask.jpg", "soft.png"):
        read_mask(tmp_path / name)
