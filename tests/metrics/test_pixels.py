"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest
from helpers.images import noise
from PIL import Image

from flux.errors import InputError
from flux.metrics.pixels import MAX_PSNR, Psnr, Ssim, psnr, psnr_or_none


def test_psnr_by_hand():
    """A fifth of the range off everywhere: 20 log10(5) dB, and a fifth is the change."""
    black, grey = Image.new("RGB", (20, 16)), Image.new("RGB", (20, 16), (51, 51, 51))
    values = Psnr().compare([black, black], [grey, black])
    assert values == pytest.approx([20 * np.log10(5), MAX_PSNR])
    assert Psnr.change(np.array(values)) == pytest.approx([0.2, 0])


def test_psnr_of_nearly_equal_images_is_below_that_of_equal_ones():
    black, dot = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64))
    dot.putpixel((3, 3), (1, 0, 0))
    assert Psnr().compare([black], [dot]) == pytest.approx([10 * np.log10(255**2 * 64 * 64 * 3)])


def test_equal_images_are_infinitely_alike():
    """The metric caps this, and JSON, which has no infinity, gets null."""
    image, other = noise(32, 24), noise(32, 24, seed=1)
    assert psnr(image, image) == math.inf
    assert psnr_or_none(image, image) is None
    assert Psnr().compare([image], [image]) == [MAX_PSNR]
    assert psnr_or_none(image, other) == round(psnr(image, other), 3)


def literal_ssim(a: Image.Image, b: Image.Image) -> float:
    """Window by window, as section III-B of the paper has it."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    a, b = (np.asarray(image, dtype=float) for image in (a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top, left, colour in np.ndindex(a.shape[0] - 10, a.shape[1] - 10, 3):
        x, y = (image[top : top + 11, left : left + 11, colour] for image in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        cov = (weights * (x - mx) * (y - my)).sum()
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_its_definition():
    """Unrelated and related images are compared, one of them flat, where rounding would show."""
    a, b, flat = noise(32, 24), noise(32, 24, seed=1), Image.new("RGB", (32, 24), (250, 3, 128))
    pairs = [(a, b), (a, Image.blend(a, b, 0.3)), (flat, Image.blend(flat, a, 0.02)), (a, a)]
    values = Ssim.load().compare(*zip(*pairs))
    assert values == pytest.approx([literal_ssim(*pair) for pair in pairs], abs=1e-7)
    assert values[-1] == pytest.approx(1)


def test_ssim_needs_a_whole_window():
    tiny = Image.new("RGB", (30, 10))
    with pytest.raises(InputError, match=r"30x10.*11x11"):
        Ssim().compare([tiny], [tiny])
