"""Reading what people have, writing what must not be lost, and sheets that can be read."""

import json
import os
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFont, PngImagePlugin

from flux.errors import InputError
from flux.files import write_json, write_text
from flux.images import sheets
from flux.images.io import crop_to_fit, read_image, read_metadata, save_animation, save_image, to_pil, to_tensor
from flux.images.sheets import grid
from flux.scan.plots import plot_vitality

QUADRANTS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def quadrants(width: int = 40, height: int = 20) -> Image.Image:
    """Red, green over blue, yellow."""
    small = np.array(QUADRANTS, dtype=np.uint8).reshape(2, 2, 3)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Tensors


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
    """Truncating as a plain cast does would darken every picture by half a level."""
    x = torch.tensor([-7.0, -1 + 0.6 / 127.5, 0.0, 1 - 0.4 / 127.5, 1.5]).expand(3, 1, 5)
    assert np.array(to_pil(x))[0, :, 0].tolist() == [0, 1, 128, 255, 255]
    assert to_pil(x.bfloat16().requires_grad_()).size == (5, 1)


def test_nan_is_told():
    with pytest.raises(InputError, match="NaN"):
        to_pil(torch.full((3, 2, 2), float("nan")))


# Reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "gif", "ppm"])
def test_reads_formats(suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
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
def test_upright(orientation, suffix, tmp_path):
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


def test_sixteen_bits(tmp_path):
    """pillow alone would turn everything above 255 of 65535 white."""
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tiff")
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 1 65535\n" + deep.byteswap().tobytes())
    for name in ("deep.png", "deep.tiff", "deep.pgm"):
        assert np.array(read_image(tmp_path / name))[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)], name


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.allclose(np.array(read_image(tmp_path / "ink.jpg")), [255, 0, 0], atol=4)


def test_float_colours_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(InputError, match="f.tiff.*floating-point"):
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


def test_no_picture_is_refused(tmp_path):
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


# Fitting


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


# Writing

METADATA = {
    "model": "flux-dev",
    "prompt": "eine Straße in 東京, « naïve » ☂",
    "seed": 7,
    "steps": [1, 2.5, None],
    "nested": {"vital": [0, 1]},
}


def test_png_is_exact_and_repeatable(tmp_path):
    save_image(noise(), tmp_path / "a.png", METADATA)
    save_image(noise(), tmp_path / "b.png", METADATA)
    assert same(read_image(tmp_path / "a.png"), noise())
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.JPG"])
def test_jpeg_is_close(name, tmp_path):
    save_image(noise(), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "JPEG"
        error = np.array(image).astype(float) - np.array(noise())
    assert np.abs(error).mean() < 4  # halved colour resolution would give about 40 on noise


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg"])
def test_metadata_survive(name, tmp_path):
    save_image(noise(), tmp_path / name, METADATA)
    assert read_metadata(tmp_path / name) == METADATA
    with Image.open(tmp_path / name) as image:
        exif = image.getexif()
    assert exif[ExifTags.Base.Software] == "AI generated;txt2img;flux"
    assert exif[ExifTags.Base.Make] == "Black Forest Labs"
    assert exif[ExifTags.Base.Model] == "flux-dev"
    assert exif[ExifTags.Base.ImageDescription].encode("latin-1").decode("utf-8") == METADATA["prompt"]


def test_png_text_is_international(tmp_path):
    """A tEXt chunk holds latin-1 only."""
    save_image(noise(), tmp_path / "a.png", METADATA)
    data = (tmp_path / "a.png").read_bytes()
    assert b"iTXtflux\0" in data
    assert "東京".encode() in data


def test_nano_is_not_black_forest_labs(tmp_path):
    save_image(noise(), tmp_path / "a.png", {"model": "flux-nano", "prompt": ""})
    with Image.open(tmp_path / "a.png") as image:
        exif = image.getexif()
    assert exif[ExifTags.Base.Model] == "flux-nano"
    assert ExifTags.Base.Make not in exif
    assert ExifTags.Base.ImageDescription not in exif


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_without_metadata(suffix, tmp_path):
    save_image(noise(), tmp_path / f"a.{suffix}")
    assert read_metadata(tmp_path / f"a.{suffix}") is None
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert not image.getexif()


def test_metadata_of_others_are_not_ours(tmp_path):
    noise().save(tmp_path / "gimp.jpg", comment="Created with GIMP")
    noise().save(tmp_path / "list.jpg", comment="[1, 2]")
    for number, text in enumerate(("no json", "[1]")):
        info = PngImagePlugin.PngInfo()
        info.add_text("flux", text)
        noise().save(tmp_path / f"{number}.png", pnginfo=info)
    for name in ("gimp.jpg", "list.jpg", "0.png", "1.png"):
        assert read_metadata(tmp_path / name) is None, name


@pytest.mark.parametrize("name", ["a.bmp", "a.webp", "a", "png"])
def test_unknown_suffix(name, tmp_path):
    with pytest.raises(InputError, match=r"\.png, \.jpg"):
        save_image(noise(), tmp_path / name)
    assert names(tmp_path) == []


def test_folders_are_made(tmp_path):
    save_image(noise(), tmp_path / "some" / "where" / "a.png")
    assert names(tmp_path / "some" / "where") == ["a.png"]


def test_files_get_usual_permissions(tmp_path):
    """A temporary file is easily private to its owner, and stays so under its new name."""
    save_image(noise(), tmp_path / "a.png")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@contextmanager
def full_disk(room: int):
    """Writing more than `room` bytes to a file fails half-way, as the operating system does it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "a.png": lambda path: save_image(noise(96, 96), path, METADATA),
    "a.jpg": lambda path: save_image(noise(96, 96), path),
    "a.gif": lambda path: save_animation([noise(96, 96), noise(96, 96, 1)], path, 0.1),
    "a.svg": lambda path: plot_vitality({0: 0.5}, 1, set(), None, path),
    "a.json": lambda path: write_json(path, list(range(5000))),
    "a.txt": lambda path: write_text(path, "word " * 5000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_keeps_the_older_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"older")
    with full_disk(4096), pytest.raises(InputError, match=rf"Cannot write .*{name}"):
        WRITERS[name](path)
    assert path.read_bytes() == b"older"
    assert names(tmp_path) == [name]
    WRITERS[name](path)
    assert path.stat().st_size > 4096
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_failing_encoder_keeps_the_older_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    save_image(noise(), path)
    older = path.read_bytes()

    def fail(image, file, *_):
        file.write(b"half a picture")
        raise RuntimeError("encoder broke")

    for kind in ("PNG", "JPEG"):
        monkeypatch.setitem(Image.SAVE, kind, fail)
    with pytest.raises(RuntimeError, match="encoder broke"):
        save_image(noise(seed=1), path)
    assert path.read_bytes() == older
    assert names(tmp_path) == [path.name]


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("older")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.txt", "newer")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "older"


def test_unwritable_places_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(InputError, match="Cannot write .*another folder"):
            save_image(noise(), path)
    assert names(tmp_path) == ["file", "folder.png"]


def test_json_and_text(tmp_path):
    write_json(tmp_path / "a.json", METADATA)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == METADATA
    assert text.endswith("}\n")
    assert "東京" in text
    write_text(tmp_path / "a.txt", "zwölf\n")
    assert (tmp_path / "a.txt").read_bytes() == "zwölf\n".encode()


def test_json_that_cannot_be_said_keeps_the_older_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "{}"


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animation(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    colours = ["red", "lime", "blue"]
    save_animation([Image.new("RGB", (40, 30), colour) for colour in colours], path, 0.25)
    with Image.open(path) as image:
        assert image.n_frames == 3
        assert image.size == (40, 30)
        assert image.info["loop"] == 0
        for frame, colour in enumerate(colours):
            image.seek(frame)
            image.load()
            assert image.info["duration"] == 250
            expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
            assert np.allclose(image.convert("RGB").getpixel((20, 15)), expected, atol=6)


def test_animation_suffix(tmp_path):
    with pytest.raises(InputError, match=r"\.gif or \.webp"):
        save_animation([noise()], tmp_path / "a.png", 1)


# Sheets


LONG = (
    "a photo of a tiny red car and a Donaudampfschifffahrtsgesellschaftskapitänsmütze on the beach, at sunset"
)
COLOURS = [["red", "lime", "blue"], ["yellow", "cyan", "magenta"]]


def plain(colour: str, width: int = 128, height: int = 96) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def box(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom."""
    found = np.all(np.array(sheet) == plain(colour).getpixel((0, 0)), axis=-1)
    (ys,), (xs,) = found.any(1).nonzero(), found.any(0).nonzero()
    return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1


def ink(sheet: Image.Image) -> np.ndarray:
    """Where there is writing: dark and grey."""
    pixels = np.array(sheet).astype(int)
    return (pixels.max(-1) < 160) & (np.ptp(pixels, axis=-1) < 8)


def test_pictures_stand_in_rows_unchanged():
    sheet = grid([[plain(colour) for colour in row] for row in COLOURS])
    boxes = [[box(sheet, colour) for colour in row] for row in COLOURS]
    for row in boxes:
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (128, 96)
            assert top == row[0][1]
        assert row[0][2] < row[1][0]
        assert row[1][2] < row[2][0] < sheet.width - 128
    assert all(upper[0] == lower[0] and upper[3] < lower[1] for upper, lower in zip(*boxes, strict=True))
    assert not ink(sheet).any()
    texture = noise(128, 96)
    sheet = grid([[plain("red"), texture]])
    left, top, right, _ = box(sheet, "red")
    gap = left
    assert same(sheet.crop((right + gap, top, right + gap + 128, top + 96)), texture)


@pytest.mark.parametrize("width", [64, 128, 512])
def test_captions_stay_under_their_picture(width):
    """Wrapped to the width, clear of the neighbours and of the row below."""
    pictures = [[plain(colour, width, 48) for colour in row] for row in COLOURS]
    sheet = grid(pictures, [[LONG, "short", LONG], ["", LONG, "two\nlines"]])
    written = ink(sheet)
    boxes = [[box(sheet, colour) for colour in row] for row in COLOURS]
    for row, inked in zip(boxes, ([True, True, True], [False, True, True]), strict=True):
        end = boxes[1][0][1] if row is boxes[0] else sheet.height
        assert [written[row[0][3] : end, left:right].any() for left, _, right, _ in row] == inked
        for left, top, right, bottom in row:
            assert (right - left, bottom - top) == (width, 48)
            assert not written[top - 8 : bottom + 4, left:right].any()
    columns = written.any(0)
    for left, _, right, _ in boxes[0]:
        columns[left:right] = False
    assert not columns.any(), "a caption is wider than its picture"
    assert not written[-8:].any()


def test_titles_stand_above_their_row():
    pictures = [[plain(colour) for colour in row] for row in COLOURS]
    captions = [[LONG] * 3] * 2
    sheet, untitled = grid(pictures, captions, [LONG * 3, "second"]), grid(pictures, captions)
    written = ink(sheet)
    left, top, _, _ = box(sheet, "red")
    right = box(sheet, "blue")[2]
    title = written[: top - 4]
    assert title.any(0).nonzero()[0].min() >= left
    assert 300 < title.any(0).nonzero()[0].max() < right
    assert (np.diff(title.any(1).astype(int)) == 1).sum() >= 3, "a long title wraps"
    assert not written[top - 4 : top].any()
    second = box(sheet, "yellow")[1] - box(sheet, "red")[1]
    assert second > box(untitled, "yellow")[1] - box(untitled, "red")[1] + 12


def test_wrapping_loses_no_word():
    font = sheets._font("DejaVuSans.ttf", 13)
    for width in (200, 400, 4000):
        lines = sheets._wrap(LONG, font, width)
        assert all(font.getlength(line) <= width for line in lines)
        assert "".join(lines).replace(" ", "") == LONG.replace(" ", "")
    assert sheets._wrap(LONG, font, 4000) == [LONG]
    assert sheets._wrap("one\n\ntwo  words ", font, 400) == ["one", "", "two words"]
    assert sheets._wrap("", font, 400) == []
    assert sheets._wrap("WWW", font, 1) == ["W", "W", "W"]


def test_overlong_captions_end_in_an_ellipsis():
    font = sheets._font("DejaVuSans.ttf", 13)
    lines = sheets._wrap("word " * 1000, font, 300)
    assert len(lines) == sheets.MAX_LINES
    assert lines[-1].endswith("word…")
    assert all(font.getlength(line) <= 300 for line in lines)


def test_accents_greek_and_cyrillic_are_drawn():
    """The font that pillow carries shows the same empty box for all of these."""
    font = sheets._font("DejaVuSans.ttf", 20)
    shapes = {bytes(font.getmask(letter)) for letter in "éßøЖλő→\uffff"}
    assert len(shapes) == 8
    assert isinstance(font, ImageFont.FreeTypeFont)


def test_empty_places_and_ragged_rows():
    sheet = grid([[plain("red"), None, plain("blue")], [plain("cyan")]], [["", "nothing here", ""], [""]])
    red, blue, cyan = (box(sheet, colour) for colour in ("red", "blue", "cyan"))
    assert cyan[0] == red[0]
    assert blue[0] - red[2] == 128 + 2 * red[0]
    middle = np.array(sheet)[red[1] : red[3], red[2] + 2 : blue[0] - 2]
    assert (middle == 255).all()
    assert ink(sheet)[red[3] :, red[2] : blue[0]].any()


def test_other_sizes_are_scaled_to_fit():
    sheet = grid([[plain("red"), plain("blue", 1280, 480)]])
    left, top, right, bottom = box(sheet, "blue")
    assert (right - left, bottom - top) == (128, 48)
    assert top - box(sheet, "red")[1] == 24


def test_sheets_have_a_limit(monkeypatch):
    pictures = [[plain(colour) for colour in row] for row in COLOURS]
    monkeypatch.setattr(sheets, "MAX_SHEET_PIXELS", 6 * 64 * 48)
    left, top, right, bottom = box(grid(pictures), "red")
    assert (right - left, bottom - top) == (64, 48)
    monkeypatch.setattr(sheets, "MAX_SHEET_SIDE", 3 * 32)
    left, top, right, bottom = box(grid(pictures), "red")
    assert (right - left, bottom - top) == (32, 24)


def test_grid_without_pictures():
    with pytest.raises(ValueError, match="at least one picture"):
        grid([[None], []])
