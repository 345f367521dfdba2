"""The invisible watermark that FLUX.1's own code puts into every image: 48 fixed bits.

The format is the "dwtDct" method of the package `invisible-watermark`
(github.com/ShieldMnt/invisible-watermark). Despite its name it uses a wavelet and no cosine transform. A
decoder does the following, so an embedder must bring it about:

1. Take the U channel of the image (BT.601: U = 0.492 (B - Y) + 128), cut to multiples of four pixels.
2. Apply one level of the Haar transform. Only its low-pass band counts: LL = (a + b + c + d) / 2 of each 2x2
   square.
3. Cut LL into blocks of 4x4, 8x8 pixels each, numbered row by row. Block n carries bit n mod 48.
4. Read a block's bit: 1 if its largest coefficient, without the first one, is in the upper half of a step of
   36.
5. Let all blocks that carry a bit vote on it.

This embedder differs from the package's, which changes the largest coefficient only: another may then be the
largest, and colours at the edge of the gamut lose the change. Here, all 15 coefficients are kept below the
new largest one, pixels that would leave the gamut move along the grey axis (which U does not see), and the
cheaper of two candidates is taken. The mark survives JPEG of quality 95. Like the package's, it survives
neither strong compression nor scaling.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flux.errors import InputError
from flux.images.io import to_uint8

WATERMARK_MESSAGE = 0b001010101111111010000111100111001111010100101110
WATERMARK_BITS = [int(bit) for bit in f"{WATERMARK_MESSAGE:048b}"]

MIN_AREA = 256 * 256  # the package neither writes nor reads smaller images
STEP = 36.0
MARGIN = 7.0  # how far inside its half of a step a coefficient is put; 9, the middle, would be more visible
MISS_COST = 1e6  # a bit that is read correctly is worth more than any usual error of its block
RGB_TO_U = np.array([-0.14713, -0.28886, 0.43601], dtype=np.float32)
U_TO_RGB = np.array([0.0, -0.39465, 2.03211], dtype=np.float32)


def embed_watermark(image: Tensor, bits: Sequence[int] = WATERMARK_BITS) -> Tensor:
    """Embed the watermark.

    Args:
        image: Images in -1..1, "n 3 h w", "3 h w" or "b n 3 h w". They are not changed.
        bits: The bits to embed.

    Returns:
        The images on the 256 levels of 8 bits, with the same shape, dtype and device. Images of fewer than
        256 * 256 pixels, or with a side under 8 pixels, cannot carry the mark and are returned unchanged.
    """
    height, width = image.shape[-2:]
    if height * width < MIN_AREA or min(height, width) < 8:
        return image
    images = to_uint8(image).reshape(-1, height, width, 3)
    for rgb in images:
        _embed(rgb, bits)
    levels = torch.from_numpy(images).permute(0, 3, 1, 2).reshape(image.shape)
    return (levels.float() / 127.5 - 1).to(dtype=image.dtype, device=image.device)


class WatermarkEmbedder:
    """Embeds bits of one's own, as upstream's class does.

    Args:
        watermark: The bits.
    """

    def __init__(self, watermark: Sequence[int]):
        self.watermark = list(watermark)
        self.num_bits = len(self.watermark)

    def __call__(self, image: Tensor) -> Tensor:
        """Return the images with the bits embedded, see `embed_watermark`."""
        return embed_watermark(image, self.watermark)


def extract_watermark(x: Tensor) -> list[int]:
    """Read the 48 bits of one image in -1..1, "3 h w" or "1 3 h w": WATERMARK_BITS if it carries the mark.

    Raises:
        InputError: More than one image, or one that is too small to carry the mark.
    """
    height, width = x.shape[-2:]
    if x.shape[:-3].numel() != 1:
        raise InputError(f"Got {x.shape[:-3].numel()} images to read a watermark from: give one at a time")
    if height * width < MIN_AREA or min(height, width) < 8:
        raise InputError(
            f"Got an image of {width}x{height}, too small to carry a watermark: expected at least "
            f"{MIN_AREA} pixels and no side under 8"
        )
    blocks = _blocks(to_uint8(x).reshape(height, width, 3).astype(np.float32))
    ones = (blocks[..., 1:].max(-1) % STEP > STEP / 2).ravel()
    return [int(ones[bit :: len(WATERMARK_BITS)].mean() >= 0.5) for bit in range(len(WATERMARK_BITS))]


def _embed(image: np.ndarray, bits: Sequence[int]) -> None:
    """Mark an image of type uint8, "H W 3", in place."""
    rows, columns = image.shape[0] // 8, image.shape[1] // 8
    area = image[: rows * 8, : columns * 8]
    rgb = area.astype(np.float32)
    blocks = _blocks(rgb)
    placed = np.resize(bits, (rows, columns))

    # Each bit has one half of every step. `start` is where its nearest half below the coefficient begins. The
    # coefficient moves well into that half, or well into the bit's next half above.
    largest = blocks[..., 1:].max(-1)
    start = STEP / 2 * placed.astype(np.float32)
    start += STEP * np.floor((largest - start) / STEP)
    below = largest.clip(start + MARGIN, start + STEP / 2 - MARGIN)
    candidates = [_recolour(rgb, blocks, level) for level in (below, start + STEP + MARGIN)]

    # Which one changes the image less, and whether the gamut allows it, depends on the block: try both.
    costs = []
    for candidate in candidates:
        error = ((candidate - rgb) ** 2).reshape(rows, 8, columns, 8, 3).sum((1, 3, 4))
        depth = (_blocks(candidate)[..., 1:].max(-1) - start) % STEP
        miss = (MARGIN - 2 - np.minimum(depth, STEP / 2 - depth)).clip(0)  # 2 for the rounding of colours
        costs.append(error + MISS_COST * miss)
    up = (costs[1] < costs[0]).repeat(8, axis=0).repeat(8, axis=1)[..., None]
    area[:] = np.where(up, candidates[1], candidates[0])


def _recolour(rgb: np.ndarray, blocks: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Recolour `rgb` so that `level` is every block's largest coefficient, in whole numbers 0..255."""
    wanted = blocks.copy()
    wanted[..., 1:] = np.minimum(wanted[..., 1:], level[..., None])
    np.put_along_axis(wanted, 1 + blocks[..., 1:].argmax(-1, keepdims=True), level[..., None], axis=-1)

    # LL is twice the mean of its 2x2 square, so the whole square moves by half the coefficient's change.
    rows, columns = level.shape
    change = (wanted - blocks).reshape(rows, columns, 4, 4).swapaxes(1, 2).reshape(rows * 4, columns * 4) / 2
    change = change.repeat(2, axis=0).repeat(2, axis=1)[..., None]
    moved = rgb + change * U_TO_RGB
    moved -= np.maximum(moved.max(-1, keepdims=True) - 255, 0)
    moved -= np.minimum(moved.min(-1, keepdims=True), 0)
    return np.rint(moved).clip(0, 255)


def _blocks(rgb: np.ndarray) -> np.ndarray:
    """Compute Haar's low-pass band of U by 4x4 blocks: "H W 3", floats 0..255, -> "H//8 W//8 16"."""
    rows, columns = rgb.shape[0] // 8, rgb.shape[1] // 8
    u = np.rint(rgb[: rows * 8, : columns * 8] @ RGB_TO_U) + 128
    low = u.reshape(rows * 4, 2, columns * 4, 2).sum((1, 3)) / 2
    return low.reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(rows, columns, 16)
