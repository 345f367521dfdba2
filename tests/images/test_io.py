"""Reading what people have: tensors, formats, colours, damage; fitting a size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import noise, same
from PIL import ExifTags, Image, ImageCms

from flux.errors import InputError
from flux.images.io import crop_to_fit, read_image, read_metadata, save_image, to_pil, to_tensor

QUADRANTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def quadrants(width: int = 40, height: int = 20) -> Image.Image:
    """Red, green over blue, yellow."""
    small = np.array(QUADRANTS, dtype=np.uint8).reshape(2, 2, 3)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


# ---- tensors


def test_every_level_survives():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    x = to_tensor(Image.fromarray(levels))
    assert x.shape == (3, 16, 16)
    assert x.dtype == torch.float32
    assert x.min() == -1
    assert x.max() == 1
    assert np.array_equal(np.array(to_pil(x)), levels)


def test_channels_and_axes():
    x = to_tensor(quadrants(4, 2))
    assert x[:, 0, 0].tolist() == [1, -1, -1]
    assert x[:, 0, 3].tolist() == [-1, 1, -1]
    assert x[:, 1, 0].tolist() == [-1, -1, 1]


def test_to_pil_rounds_and_cuts():
    """Truncating as a plain cast does would darken every image by half a level."""
    x = torch.tensor([-7.0, -1 + 0.6 / 127.5, 0.0, 1 - 0.4 / 127.5, 1.5]).expand(3, 1, 5)
    assert np.array(to_pil(x))[0, :, 0].tolist() == [0, 1, 128, 255, 255]
    assert to_pil(x.bfloat16().requires_grad_()).size == (5, 1)


def test_nan_is_told():
    with pytest.raises(InputError, match=r"NaN.*float16.*LoRA"):
        to_pil(torch.full((3, 2, 2), float("nan")))


# ---- reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm"])
def test_images_of_each_format_are_read(suffix, tmp_path):
    path = tmp_path / f"image.{suffix}"
    quadrants().save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert same(read_image(path), quadrants())
    assert same(read_image(str(path)), quadrants())


def test_reads_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    assert same(read_image(tmp_path / "dot.png"), Image.new("RGB", (1, 1), "red"))


ORIENTATIONS = {  # EXIF value: where red, green, blue, yellow of the file are to be seen (reading order)
    1: "rgby", 2: "gryb", 3: "ybgr", 4: "byrg", 5: "rbgy", 6: "bryg", 7: "ygbr", 8: "gyrb",
}  # fmt: skip


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_photographs_are_turned_upright(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"turned.{suffix}"
    quadrants().save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    image = read_image(path)
    assert image.size == ((40, 20) if orientation < 5 else (20, 40))
    colours = dict(zip("rgby", QUADRANTS, strict=True))
    width, height = image.size
    for letter, (x, y) in zip(ORIENTATIONS[orientation], ((1, 1), (3, 1), (1, 3), (3, 3)), strict=True):
        seen = image.getpixel((x * width // 4, y * height // 4))
        assert np.allclose(seen, colours[letter], atol=3), letter


def test_broken_exif_does_not_matter(tmp_path):
    quadrants().save(tmp_path / "a.png", exif=b"Exif\0\0no such thing")
    assert same(read_image(tmp_path / "a.png"), quadrants())


def test_alpha_lies_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (255, 0, 0, 102), (12, 34, 56, 0)]):
        image.putpixel((x, 0), pixel)
    image.save(tmp_path / "a.png")
    pixels = np.array(read_image(tmp_path / "a.png"))[0].tolist()
    assert pixels == [[255, 0, 0], [255, 153, 153], [255, 255, 255]]


def test_transparent_palette_grey_and_key_colour(tmp_path):
    """Three more ways in which a file may say transparent."""
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    rgb = Image.new("RGB", (2, 1), "red")
    rgb.putpixel((1, 0), (0, 0, 255))
    rgb.save(tmp_path / "key.png", transparency=(0, 0, 255))
    for name in ("palette.png", "palette.gif", "key.png"):
        assert np.array(read_image(tmp_path / name))[0].tolist() == [[255, 0, 0], [255, 255, 255]], name
    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    grey.save(tmp_path / "grey.png")
    assert np.array(read_image(tmp_path / "grey.png"))[0].tolist() == [[10] * 3, [255] * 3]


def test_grey_and_bilevel(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    grey.save(tmp_path / "l.png")
    assert same(read_image(tmp_path / "l.png"), grey.convert("RGB"))
    grey.convert("1").save(tmp_path / "1.png")
    assert same(read_image(tmp_path / "1.png"), grey.convert("1").convert("RGB"))


def test_sixteen_bits_become_eight(tmp_path):
    """pillow alone would turn everything above 255 of 65535 white."""
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 1 65535\n" + deep.byteswap().tobytes())
    for name in ("deep.png", "deep.tiff", "deep.pgm"):
        assert np.array(read_image(tmp_path / name))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)], name


def test_a_transparent_sixteen_bit_grey(tmp_path):
    deep = Image.fromarray(np.array([[257, 32896]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png", transparency=257)
    assert np.array(read_image(tmp_path / "deep.png"))[0].tolist() == [[255] * 3, [128] * 3]


def adobe_rgb() -> bytes:
    """A profile of sRGB's curve with Adobe RGB's far greener green, told only by its numbers."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for name, xyz in {b"rXYZ": (0.60974, 0.31111, 0.01947), b"gXYZ": (0.20528, 0.62567, 0.06087)}.items():
        place = profile.index(name, 128)
        start = int.from_bytes(profile[place + 4 : place + 8], "big")
        for number, value in enumerate(xyz):
            at = start + 8 + 4 * number
            profile[at : at + 4] = round(value * 65536).to_bytes(4, "big")
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "Wide".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_a_wider_profile_are_converted(mode, tmp_path):
    """Green is brighter there: in sRGB it has no red at all."""
    Image.new("RGB", (2, 1), (100, 200, 100)).convert(mode).save(tmp_path / "a.png", icc_profile=adobe_rgb())
    red, green, blue = np.array(read_image(tmp_path / "a.png"))[0, 0].tolist()
    assert red < 40
    assert 195 < green < 210
    assert 80 < blue < 110


def test_transparency_stays_beside_a_profile(tmp_path):
    image = Image.new("RGBA", (2, 1), (100, 200, 100, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / "a.png", icc_profile=adobe_rgb())
    pixels = np.array(read_image(tmp_path / "a.png"))[0].tolist()
    assert pixels[0][0] < 40
    assert pixels[1] == [255, 255, 255]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_of_srgb_changes_nothing(mode, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise().convert(mode).save(tmp_path / "a.png", icc_profile=profile)
    assert same(read_image(tmp_path / "a.png"), noise().convert(mode).convert("RGB"))


def test_greys_may_have_a_profile_of_colours(tmp_path):
    Image.new("L", (2, 1), 100).save(tmp_path / "a.png", icc_profile=adobe_rgb())
    pixel = np.array(read_image(tmp_path / "a.png"))[0, 0]
    assert np.ptp(pixel.astype(int)) < 30


@pytest.mark.parametrize("profile", [b"no profile", adobe_rgb()[:200]], ids=["text", "cut short"])
def test_a_broken_profile_is_told_and_ignored(profile, tmp_path):
    quadrants().save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"a\.png, whose colour profile is broken"):
        assert same(read_image(tmp_path / "a.png"), quadrants())


def test_colours_of_ink_are_read(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.allclose(np.array(read_image(tmp_path / "ink.jpg")), [255, 0, 0], atol=4)


def test_float_colours_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match=r"f\.tiff.*floating-point"):
        read_image(tmp_path / "f.tiff")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animations_and_pages_are_refused(suffix, tmp_path):
    path = tmp_path / f"moving.{suffix}"
    noise().save(path, save_all=True, append_images=[noise(seed=1), noise(seed=2)])
    with pytest.raises(InputError, match=rf"moving\.{suffix}.*3 images"):
        read_image(path)


def test_camera_files_with_previews_are_read(tmp_path):
    quadrants().save(
        tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[noise()], quality=100
    )
    with Image.open(tmp_path / "camera.jpg") as image:
        assert image.format == "MPO"
        assert image.n_frames == 2
    assert read_image(tmp_path / "camera.jpg").size == quadrants().size


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_cut_short_is_refused(suffix, share, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    noise(96, 96).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=rf"cut\.{suffix}"):
        read_image(path)


def test_no_image_is_refused(tmp_path):
    damaged = bytearray(save(tmp_path / "good.png"))
    damaged[60:90] = bytes(30)
    for name, data in {"empty.png": b"", "text.png": b"hello\n" * 50, "damaged.png": bytes(damaged)}.items():
        (tmp_path / name).write_bytes(data)
        for read in (read_image, read_metadata) if name != "damaged.png" else (read_image,):
            with pytest.raises(InputError, match=name) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


def save(path: Path) -> bytes:
    noise().save(path)
    return path.read_bytes()


@pytest.mark.parametrize("read", [read_image, read_metadata])
def test_missing_and_folder(read, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png.*not there"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match=f"{tmp_path.name}.*folder"):
        read(tmp_path)


@pytest.mark.parametrize("limit", [1500, 700])
def test_gigantic_is_refused(limit, tmp_path, monkeypatch):
    """pillow only warns up to twice its limit and refuses above; here both are refused."""
    noise(48, 32).save(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"vast\.png.*million pixels"):
        read_image(tmp_path / "vast.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 32)
    assert read_image(tmp_path / "vast.png").size == (48, 32)


def test_metadata_of_a_photograph_is_left_behind(tmp_path):
    """Who publishes an edit need not publish where the photograph was taken."""
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "a private name"
    quadrants().save(tmp_path / "in.jpg", exif=exif, comment="a private remark", dpi=(300, 300))
    for name in ("out.png", "out.jpg"):
        save_image(read_image(tmp_path / "in.jpg"), tmp_path / name)
        assert b"private" not in (tmp_path / name).read_bytes()


# ---- fitting


@pytest.mark.parametrize("size", [(40, 20), (10, 10), (64, 16), (16, 64), (1, 1)])
def test_fit_covers_and_centres(size):
    image = crop_to_fit(quadrants(400, 300), *size)
    assert image.size == size
    if min(size) >= 10:
        w, h = size
        corners = [image.getpixel(at) for at in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))]
        assert np.allclose(corners, QUADRANTS, atol=2)


def test_fit_crops_the_middle():
    stripes = Image.fromarray(np.arange(90, dtype=np.uint8).repeat(3).reshape(1, 90, 3).repeat(30, axis=0))
    assert np.array(crop_to_fit(stripes, 30, 30))[0, :, 0].tolist() == list(range(30, 60))
