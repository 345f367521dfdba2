"""Writing images that can be read again, whole or not at all."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from helpers.images import noise, same
from PIL import ExifTags, Image, PngImagePlugin

from flux.errors import InputError
from flux.images.io import read_image, read_metadata, save_animation, save_image

METADATA = {
    "model": "flux-dev",
    "prompt": "eine Straße in 東京, « naïve » ☂",
    "seed": 7,
    "steps": [1, 2.5, None],
    "nested": {"vital": [0, 1]},
}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


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


@pytest.mark.parametrize("prompt", ["a dog " * 6000, "a dog " * 12_000, "犬" * 30_000, '"' * 40_000])
def test_metadata_too_long_for_a_jpeg_are_cut(prompt, tmp_path, capsys):
    """The image is written all the same, and its metadata hold the beginning of the prompt."""
    path = tmp_path / "a.jpg"
    save_image(noise(), path, {"model": "flux-dev", "prompt": prompt, "seed": 3})
    found = read_metadata(path)
    assert (found["model"], found["seed"]) == ("flux-dev", 3)
    assert len(found["prompt"]) >= 1000
    assert prompt.startswith(found["prompt"])
    assert capsys.readouterr().err == f"{path}: metadata are cut, since a JPEG holds only 64 KiB of them\n"
    assert read_image(path).size == noise().size


@pytest.mark.parametrize("length", range(30_000, 34_000, 250))
def test_long_metadata_at_the_limit(length, tmp_path):
    save_image(noise(), tmp_path / "a.jpg", {"model": "flux-dev", "prompt": "x" * length})
    assert len(read_metadata(tmp_path / "a.jpg")["prompt"]) in (length, 6000)


def test_long_lists_in_the_metadata_of_a_jpeg_go(tmp_path):
    save_image(noise(), tmp_path / "a.jpg", {"seed": 3, "settings": {"prompts": ["a dog"] * 20_000}})
    assert read_metadata(tmp_path / "a.jpg") == {"seed": 3}


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
def test_without_metadata_only_pixels_are_written(suffix, tmp_path):
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
def test_other_suffixes_are_refused(name, tmp_path):
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


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_shows_its_images_in_turn(suffix, tmp_path):
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


def test_an_animation_is_a_gif_or_a_webp(tmp_path):
    with pytest.raises(InputError, match=r"\.gif or \.webp"):
        save_animation([noise()], tmp_path / "a.png", 1)
