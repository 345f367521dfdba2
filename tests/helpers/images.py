"""Images of random pixels, and how far two images are apart."""

import numpy as np
from PIL import Image


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Draw an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    """Return whether two images have the same mode, size and pixels."""
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()


def difference(a: Image.Image, b: Image.Image) -> int:
    """Return the largest difference of all pixels and colours, in levels of 255."""
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def rms(a: Image.Image, b: Image.Image) -> float:
    """Return the root mean square of the difference of two images, in levels of 255."""
    return float(np.sqrt(np.square(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()))
