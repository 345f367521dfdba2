"""The watermark against the decoder of the package that defines it, and against what an eye would notice."""

from io import BytesIO

import numpy as np
import pytest
import torch
from imwatermark import WatermarkDecoder
from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image, save_image, to_pil, to_tensor
from flux.images.watermark import WATERMARK_BITS, WATERMARK_MESSAGE, embed_watermark, extract_watermark


def package_bits(image: Image.Image) -> list[int]:
    """The bits that the invisible-watermark package reads. It takes BGR."""
    bgr = np.ascontiguousarray(np.asarray(image)[..., ::-1])
    return [int(bit) for bit in WatermarkDecoder("bits", 48).decode(bgr, "dwtDct")]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) / 2).square().mean()))


def as_jpeg(image: Image.Image) -> Image.Image:
    """Saved and opened again, in the quality that `save_image` uses."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return Image.open(buffer)


def scene(width: int, height: int, seed: int = 0) -> torch.Tensor:
    """3 H W: soft colours, hard edges, flat parts and some grain, like a generated image."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    image = np.array(soft)
    image[height // 3 : height // 2, width // 5 : width // 2] = random.integers(0, 256, 3)
    image[: height // 4, : width // 4] = 255
    image[-height // 5 :, -width // 4 :] = 0
    grain = random.normal(0, 3, (height // 2, width, 3))
    image[-grain.shape[0] :] = (image[-grain.shape[0] :] + grain).clip(0, 255)
    return to_tensor(Image.fromarray(image))


def test_the_message_is_upstreams():
    """The constants are upstream's; the first bit is the most significant."""
    assert len(WATERMARK_BITS) == 48
    assert int("".join(map(str, WATERMARK_BITS)), 2) == WATERMARK_MESSAGE == 0x2AFE879CF52E


@pytest.mark.parametrize(
    "size", [(256, 256), (1024, 768), (257, 263), (511, 301), (260, 254), (8, 8200), (9003, 11)]
)
def test_package_reads_the_mark_from_a_png(size, tmp_path):
    x = scene(size[1], size[0]).transpose(1, 2) if size[0] < size[1] else scene(*size)
    save_image(to_pil(embed_watermark(x)), tmp_path / "marked.png")
    image = read_image(tmp_path / "marked.png")
    assert image.size == (x.shape[2], x.shape[1])
    assert package_bits(image) == WATERMARK_BITS
    assert extract_watermark(to_tensor(image)) == WATERMARK_BITS


@pytest.mark.parametrize("seed", range(4))
def test_the_mark_is_invisible(seed):
    x = scene(512, 384, seed)
    marked = embed_watermark(x)
    assert psnr(x, marked) > 40
    assert (x - marked).abs().max() * 127.5 < 40


COLOURS = "black white grey red lime blue yellow cyan magenta #6e3c14 #010101 #fefefe"


@pytest.mark.parametrize("colour", COLOURS.split())
def test_flat_colours_hold_the_mark(colour):
    """One colour leaves no largest coefficient to start from, and at the gamut's edge U moves one way only.

    Blue, cyan and magenta have so large a U that many of their blocks have to be lowered as a whole: these
    three miss the 35 dB that all others keep.
    """
    x = to_tensor(Image.new("RGB", (256, 256), colour))
    marked = embed_watermark(x)
    assert package_bits(to_pil(marked)) == WATERMARK_BITS
    assert extract_watermark(marked) == WATERMARK_BITS
    assert package_bits(as_jpeg(to_pil(marked))) == WATERMARK_BITS
    assert psnr(x, marked) > (30 if colour in ("blue", "cyan", "magenta") else 35)


def test_harsh_images_hold_the_mark():
    """Noise at the gamut's corners: single blocks may fail there, the vote must not."""
    corners = np.random.default_rng(0).integers(0, 2, (300, 280, 3), dtype=np.uint8) * 255
    marked = embed_watermark(to_tensor(Image.fromarray(corners)))
    assert package_bits(to_pil(marked)) == WATERMARK_BITS


def test_survives_painting_over():
    """Every bit stands in many blocks, and the majority decides."""
    marked = embed_watermark(scene(512, 512))
    marked[:, 100:300, 200:450] = 0
    marked[:, 350:, :150] = 0.3
    assert package_bits(to_pil(marked)) == WATERMARK_BITS
    assert extract_watermark(marked) == WATERMARK_BITS


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
def test_rows_of_a_batch_are_marked_one_by_one(lead):
    """Rows of a batch are marked each for itself, in their places."""
    images = [scene(264, 256, seed) for seed in range(int(np.prod(lead)))]
    x = torch.stack(images).reshape(*lead, 3, 256, 264)
    before = x.clone()
    marked = embed_watermark(x)
    assert marked.shape == x.shape
    assert marked.dtype == x.dtype
    assert torch.equal(x, before)
    expected = torch.stack([embed_watermark(image) for image in images])
    assert torch.equal(marked.reshape(-1, 3, 256, 264), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_mark(dtype):
    """Half the bits still tell 256 levels apart."""
    marked = embed_watermark(scene(256, 256).to(dtype))
    assert marked.dtype == dtype
    assert package_bits(to_pil(marked)) == WATERMARK_BITS


def test_marking_twice_changes_little():
    """A marked image has its coefficients where the mark wants them: a second dose is no second loss."""
    once = embed_watermark(scene(512, 512))
    assert psnr(once, embed_watermark(once)) > 55


def test_too_small_is_left_alone():
    for width, height in ((255, 257), (128, 128), (1, 1), (70000, 7)):
        x = torch.rand(1, 3, height, width) * 2 - 1
        assert embed_watermark(x) is x
        with pytest.raises(InputError, match=f"{width}x{height}"):
            extract_watermark(x)


def test_unmarked_is_told_apart():
    bits = extract_watermark(scene(512, 512))
    assert sum(a != b for a, b in zip(bits, WATERMARK_BITS, strict=True)) > 8


def test_extract_takes_one_image():
    assert extract_watermark(embed_watermark(scene(256, 256))[None]) == WATERMARK_BITS
    with pytest.raises(InputError, match="2 images"):
        extract_watermark(torch.zeros(2, 3, 256, 256))
