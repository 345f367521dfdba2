"""How far images are apart, pixel by pixel: PSNR and SSIM."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.metrics.base import Metric


def psnr(a: Image, b: Image) -> float | None:
    """Peak signal-to-noise ratio between two pictures of one size, in dB; None if they are equal."""
    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return round(float(10 * np.log10(255**2 / error)), 3) if error else None


MAX_PSNR = 100.0  # dB, that of equal pictures


class Psnr(Metric):
    """10 log10(255^2 / mean squared error) in dB, at most MAX_PSNR, which equal pictures have.

    Its change is the root mean square error as a fraction of the range of the pixels, 10^(-dB / 20): it falls
    as the dB rise, and is in 0..1, so that one nearly unchanged picture does not rule the mean.
    """

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        values = []
        for pair in zip(references, pictures, strict=True):
            a, b = (np.asarray(picture, dtype=np.float64) for picture in pair)
            error = np.square(a - b).mean()
            values.append(min(MAX_PSNR, float(10 * np.log10(255**2 / error))) if error else MAX_PSNR)
        return values

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        return np.where(values >= MAX_PSNR, 0, 10 ** (-values / 20))


class Ssim(Metric):
    """Structural similarity (Wang et al. 2004, "Image Quality Assessment", equation 13): means, variances and
    covariance under a gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03; the mean over
    all windows that lie in the picture and over red, green and blue.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        # float64, since variances are small differences of squares; Apple's GPU has none.
        self.device = "cpu" if torch.device(device).type == "mps" else device
        window = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
        self.window = (window / window.sum()).tolist()

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Ssim":
        return cls(device)

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        return [self._of_pair(*pair) for pair in zip(references, pictures, strict=True)]

    def _of_pair(self, reference: Image, picture: Image) -> float:
        if min(picture.size) < len(self.window):
            raise InputError(
                f"Got a picture of {picture.width}x{picture.height} for ssim: expected 11x11 at least"
            )
        x, y = (to_tensor(image).to(self.device, torch.float64) / 2 + 0.5 for image in (reference, picture))
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
