"""Attention drawn: heat maps, legends, sheets."""

import numpy as np
import torch
from helpers.attention import DOG, settings
from PIL import Image

from flux.attention import sheets
from flux.attention.sheets import colour_scale, heat_map, layers_sheet, percent, words_sheet
from flux.attention.watch import watch


def test_heat_is_where_the_values_are():
    """Tokens run along the rows; the colour of the top value is the map's last."""
    from matplotlib import colormaps

    values = torch.zeros(2 * 4)
    values[6] = 0.02
    pixels = np.asarray(heat_map(Image.new("RGB", (64, 32), "white"), values, 0.02)).astype(int)
    assert pixels.shape == (32, 64, 3)
    for place, value in (((0, 0), 0.0), ((31, 8), 0.0), ((31, 40), 1.0)):
        expected = 255 * (0.7 * np.array(colormaps["magma"](value)[:3]) + 0.3)
        assert np.abs(pixels[place] - expected).max() < 12


def test_scale_runs_upwards():
    bar = np.asarray(colour_scale(96, 96, 0.4).convert("L")).astype(int)[:, 15]
    inside = bar[11:85]
    assert inside[0] > inside[-1] + 100
    assert (np.diff(inside) <= 0).all()
    assert (bar[:11] == 255).all()
    assert (bar[85:] == 255).all()


def test_percentages():
    assert [percent(share) for share in (0, 0.00067, 0.0312, 0.0996, 0.5, 1)] == [
        "0%", "0.067%", "3.1%", "10%", "50%", "100%",
    ]  # fmt: skip


def test_sheets_have_a_place_for_everything(nano, monkeypatch):
    rows = {}

    def spy(images, captions, titles):
        rows.update(images=images, captions=captions, titles=titles)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(sheets, "grid", spy)
    chosen = settings(at_steps=(0, 1, 3), words=("dog", "top hat"))
    _, seen = watch(nano, DOG, 7, chosen, progress=False)
    picture = Image.new("RGB", (96, 64))

    layers_sheet(picture, seen, num_double=5)
    assert rows["titles"] == ["layer 3 (double-stream)", "layer 12 (single-stream)"]
    assert [len(row) for row in rows["images"]] == [len(row) for row in rows["captions"]] == [5, 5]
    found = seen[1].layers[12]
    assert rows["captions"][1][2] == (
        f"step 1, t = {seen[1].t:.2f}: text {percent(found.text.mean())} "
        f"(padding {percent(found.padding.mean())}), image {percent(found.image.mean())}"
    )

    words_sheet(picture, seen, num_double=5)
    assert [len(row) for row in rows["images"]] == [len(row) for row in rows["captions"]] == [4] * 4
    assert rows["titles"][0] == (
        "layer 3 (double-stream): image tokens attend to the word (mean of steps 0, 1, 3)"
    )
    mean = torch.stack([step.layers[12].from_words["top hat"] for step in seen]).mean(dim=0)
    assert rows["captions"][3][2] == f"top hat: up to {percent(mean.max())}, mean {percent(mean.mean())}"
    assert all(image.size == (96, 64) for row in rows["images"] for image in row)
