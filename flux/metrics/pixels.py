"""Pixel-wise similarity of images: PSNR and SSIM."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.metrics.base import Metric

MAX_PSNR = 100.0  # dB; where an infinite PSNR cannot be written or averaged, equal images count as this


def mean_squared_error(a: Image, b: Image) -> float:
    """Return the mean squared difference of two images of one size, colours in 0..1."""
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return float(np.square(difference / 255).mean())


def decibels(error: float) -> float:
    """Convert a mean squared error of colours in 0..1 to PSNR in dB; infinite for an error of 0."""
    return float(-10 * np.log10(error)) if error else math.inf


def psnr(a: Image, b: Image) -> float:
    """Return the peak signal-to-noise ratio of two images of one size in dB; infinite for equal images."""
    return decibels(mean_squared_error(a, b))


def psnr_or_none(a: Image, b: Image) -> float | None:
    """Return `psnr` rounded for JSON, which knows no infinity. For equal images returns None."""
    value = psnr(a, b)
    return round(value, 3) if math.isfinite(value) else None


class Psnr(Metric):
    """PSNR in dB, at most MAX_PSNR.

    Its change is the root mean square error, colours in 0..1: 10^(-dB / 20). This falls as the dB rise and
    is bounded, so one nearly unchanged image does not dominate a mean.
    """

    change_name = "root mean square error"

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Psnr":  # noqa: ARG003 - the signature of Metric.load
        """Return the metric, which needs no model: `source` and `device` are those of `Metric.load`."""
        return cls()

    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return the PSNR of each image and its reference in dB, capped at MAX_PSNR."""
        return [min(MAX_PSNR, psnr(*pair)) for pair in zip(references, images, strict=True)]

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        """Convert dB to root mean square errors; MAX_PSNR to 0."""
        return np.where(values >= MAX_PSNR, 0, 10 ** (-values / 20))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004, "Image Quality Assessment", equation 13).

    Means, variances and covariance are taken under a gaussian window of 11 x 11 pixels and sigma 1.5, with
    K1 = 0.01 and K2 = 0.03. The result is the mean over all windows inside the image and over red, green and
    blue.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        # float64, since variances are small differences of squares; Apple's GPU has none.
        self.device = "cpu" if torch.device(device).type == "mps" else device
        window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
        self.window = (window / window.sum()).tolist()

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Ssim":  # noqa: ARG003 - the signature of Metric.load
        """Return the metric, which needs no model: `source` is that of `Metric.load`."""
        return cls(device)

    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Return the SSIM of each image and its reference, at most 1.

        Raises:
            InputError: Images smaller than the window.
        """
        return [self._compare_pair(*pair) for pair in zip(references, images, strict=True)]

    def _compare_pair(self, reference: Image, image: Image) -> float:
        if min(image.size) < len(self.window):
            raise InputError(
                f"Got an image of {image.width}x{image.height} for ssim: expected 11x11 at least"
            )
        x, y = (to_tensor(side).to(self.device, torch.float64) / 2 + 0.5 for side in (reference, image))
        moments = torch.stack((x, y, x * x, y * y, x * y))
        for dim in (-1, -2):
            places = moments.shape[dim] - len(self.window) + 1
            blurred = torch.zeros_like(moments.narrow(dim, 0, places))
            for shift, weight in enumerate(self.window):
                blurred.add_(moments.narrow(dim, shift, places), alpha=weight)
            moments = blurred
        mean_x, mean_y, xx, yy, xy = moments
        variances = xx - mean_x.square() + yy - mean_y.square()
        covariance = xy - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        values = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values = values / ((mean_x.square() + mean_y.square() + c1) * (variances + c2))
        return values.mean().item()
