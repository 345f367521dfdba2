"""Images of random pixels, and whether two images are the same."""

import numpy as np
from PIL import Image


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Draw an image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(a: Image.Image, b: Image.Image) -> bool:
    """Return whether two images have the same mode, size and pixels."""
    return a.mode == b.mode and a.size == b.size and a.tobytes() == b.tobytes()
