"""Tiles cover an image and leave no seams."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flux.images.io import to_tensor
from flux.runtime import tiling
from flux.runtime.tiling import in_tiles, starts

TILE = 24


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", TILE)
    monkeypatch.setattr(tiling, "OVERLAP", 8)


# The tiles' size is the same in all examples.
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
sides = st.integers(1, 3 * TILE)


def enlarge(x: Tensor) -> Tensor:
    return x.repeat_interleave(8, dim=-1).repeat_interleave(8, dim=-2)


@given(height=sides, width=sides)
@quick
def test_functions_of_single_positions_are_the_same_in_tiles(small_tiles, height, width):
    x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_tiles(enlarge, x, 8), enlarge(x), rtol=0, atol=1e-6)
    shrink = torch.nn.AvgPool2d(8)
    torch.testing.assert_close(in_tiles(shrink, enlarge(x), 1 / 8), shrink(enlarge(x)), rtol=0, atol=1e-6)


@given(height=sides, width=sides)
@quick
def test_no_tile_is_larger_than_asked(small_tiles, height, width):
    shapes = []

    def recorded(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[-2:]))
        return enlarge(x)

    in_tiles(recorded, torch.zeros(1, 1, height, width), 8)
    assert set(shapes) == {(min(height, TILE), min(width, TILE))}
    assert len(shapes) == len(starts(height, TILE, 8)) * len(starts(width, TILE, 8))


@given(side=st.integers(1, 2000), tile=st.integers(2, 100), overlap=st.integers(1, 99))
def test_tiles_cover_a_side_and_overlap(side, tile, overlap):
    overlap = min(overlap, tile - 1)
    found = starts(side, tile, overlap)
    assert found[0] == 0
    assert found[-1] == max(side - tile, 0)
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(found))


def test_starts_of_tiles():
    assert starts(64, 64, 16) == [0]
    assert starts(128, 64, 16) == [0, 48, 64]
    assert starts(10, 64, 16) == [0]


def test_an_image_decoded_in_tiles_is_nearly_the_same(nano, small_tiles):
    """Normalised tile by tile: at least 32 dB, and no larger jumps between pixels at a seam."""
    prompt = ["a photo of a dog on the grass"]
    size = {"width": 256, "height": 256, "num_steps": 4, "guidance": 3.5, "progress": False}
    [image] = nano.generate(prompt, [1], **size)
    with torch.inference_mode():
        latent = nano.ae.encode(to_tensor(image)[None])
        plain, tiled = nano.ae.decode(latent), in_tiles(nano.ae.decode, latent, 8)
    error = tiled - plain
    assert 10 * math.log10(4 / error.square().mean()) > 32
    jumps = error.diff(dim=-1).abs().mean(dim=(0, 1, 2))[8:-8]
    assert jumps.max() < 8 * jumps.mean()
    assert tiny_models.relative_error(in_tiles(nano.ae.encode, plain, 1 / 8), nano.ae.encode(plain)) < 0.3
