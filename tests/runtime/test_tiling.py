"""Tiles put together: nothing is lost at the seams."""

import math

import pytest
import torch
from helpers import tiny_models

from flux.runtime import tiling
from flux.runtime.tiling import in_tiles, starts


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 24)
    monkeypatch.setattr(tiling, "OVERLAP", 8)


def up(x):
    return x.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)


@pytest.mark.parametrize("size", [(1, 1), (24, 24), (25, 24), (24, 90), (50, 70), (40, 41)])
def test_what_knows_no_neighbours_is_the_same_in_tiles(small_tiles, size):
    x = torch.randn(1, 3, *size)
    torch.testing.assert_close(in_tiles(up, x, 8), up(x), rtol=0, atol=1e-6)
    down = torch.nn.AvgPool2d(8)
    torch.testing.assert_close(in_tiles(down, up(x), 1 / 8), down(up(x)), rtol=0, atol=1e-6)


def test_no_tile_is_larger_than_asked(small_tiles):
    seen = []
    in_tiles(lambda x: (seen.append(x.shape[-2:]), up(x))[1], torch.zeros(1, 1, 50, 70), 8)
    assert len(seen) == 12
    assert set(seen) == {(24, 24)}


def test_tiles_cover_a_side():
    assert starts(64, 64, 16) == [0]
    assert starts(128, 64, 16) == [0, 48, 64]
    assert starts(10, 64, 16) == [0]


def test_a_picture_decoded_in_tiles_is_nearly_the_same(nano, small_tiles):
    """Normalised tile by tile: at least 32 dB, and no seam, where a jump between neighbours would be."""
    prompt = ["a photo of a dog on the grass"]
    size = {"width": 256, "height": 256, "num_steps": 4, "guidance": 3.5, "progress": False}
    [picture] = nano.generate(prompt, [1], **size)
    from flux.images.io import to_tensor

    with torch.inference_mode():
        latent = nano.ae.encode(to_tensor(picture)[None])
        plain, tiled = nano.ae.decode(latent), in_tiles(nano.ae.decode, latent, 8)
    error = tiled - plain
    assert 10 * math.log10(4 / error.square().mean()) > 32
    jumps = error.diff(dim=-1).abs().mean(dim=(0, 1, 2))[8:-8]
    assert jumps.max() < 8 * jumps.mean()
    assert tiny_models.relative_error(in_tiles(nano.ae.encode, plain, 1 / 8), nano.ae.encode(plain)) < 0.3
