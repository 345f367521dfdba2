import pytest
from PIL import Image

from flux.errors import InputError
from flux.images.io import save_image
from flux.studio.limits import Limits


def test_uploads_are_bare_pixels(studio, tmp_path, photo):
    exif = Image.Exif()
    exif[274], exif[270] = 6, "where I live"  # turned by a quarter, and a secret
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = studio.limits.read_upload({"path": tmp_path / "photo.jpg"}, tmp_path)
    assert image.size == photo.size[::-1]
    assert not image.info
    kept = studio.sessions.of("a").keep_upload(image)
    assert b"where I live" not in kept.read_bytes()
    assert kept.suffix == ".png"


def test_a_mask_may_be_paint_on_a_transparent_layer(studio, tmp_path):
    layer = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    layer.save(tmp_path / "layer.png")
    mask = studio.limits.read_upload({"path": tmp_path / "layer.png"}, tmp_path, is_mask=True)
    assert (mask.getpixel((0, 0)), mask.getpixel((63, 0))) == (255, 0)


def test_uploads_from_elsewhere_are_refused(studio, tmp_path, photo):
    inside = tmp_path / "uploads"
    inside.mkdir()
    save_image(photo, tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    outside = [tmp_path / "secret.png", inside / "../secret.png", inside / "link.png", "/etc/passwd"]
    wrong = [{"path": path} for path in (*outside, "a\0b", "a" * 5000, None, 7)]
    for upload in (*wrong, "no.png", [], {}):
        with pytest.raises(InputError, match="not uploaded"):
            studio.limits.read_upload(upload, inside)


def test_files_that_are_no_images_are_named_without_their_folder(studio, tmp_path):
    (tmp_path / "no.png").write_text("<svg/>")
    with pytest.raises(InputError, match=r"Got no\.png") as caught:
        studio.limits.read_upload({"path": tmp_path / "no.png"}, tmp_path)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(("limit", "said"), [("upload_bytes", "MB"), ("upload_pixels", "pixels")])
def test_large_uploads_are_refused(tmp_path, photo, limit, said):
    save_image(photo, tmp_path / "big.png")
    with pytest.raises(InputError, match=said):
        Limits(64, 64, **{limit: 10}).read_upload({"path": tmp_path / "big.png"}, tmp_path)


def test_small_images_are_refused_and_small_masks_are_not(studio, tmp_path):
    save_image(Image.new("RGB", (64, 15)), tmp_path / "low.png")
    with pytest.raises(InputError, match="64x15 pixels, expected at least 16 to a side"):
        studio.limits.read_upload({"path": tmp_path / "low.png"}, tmp_path)
    assert studio.limits.read_upload({"path": tmp_path / "low.png"}, tmp_path, is_mask=True).size == (64, 15)
