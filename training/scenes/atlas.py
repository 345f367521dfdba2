"""The sprite atlas: one WebP image with a cell for every sprite of the vocabulary."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from training.scenes.vocabulary import SPRITES

ATLAS_FILE = Path(__file__).with_name("atlas.webp")
CELL = 160
COLUMNS = 12


@lru_cache(maxsize=1)
def sprites() -> np.ndarray:
    """Read all sprites, uint8 `S CELL CELL 4`, colours not multiplied by alpha. The array is read-only."""
    sheet = np.asarray(Image.open(ATLAS_FILE).convert("RGBA"))
    cells = [divmod(number, COLUMNS) for number in range(len(SPRITES))]
    images = np.stack([sheet[r * CELL : (r + 1) * CELL, c * CELL : (c + 1) * CELL] for r, c in cells])
    images.setflags(write=False)
    return images


@lru_cache(maxsize=1)
def boxes() -> list[tuple[float, float, float, float]]:
    """Measure left, top, right and bottom of the visible part of each sprite, as fractions of its cell."""
    found = []
    for image in sprites():
        visible = image[..., 3] > 40
        columns, rows = np.flatnonzero(visible.any(0)), np.flatnonzero(visible.any(1))
        edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        found.append(tuple(float(edge) / CELL for edge in edges))
    return found
