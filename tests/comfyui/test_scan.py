"""The scan's arithmetic, chart and file."""

import json

import pytest
import torch

from comfyui import scan

IMAGES = torch.eye(3)


def test_vitality_is_one_minus_the_mean_similarity():
    # Features are the images themselves. Layer 0 changes one image of two wholly, layer 1 none.
    drawn = {None: [0, 1], 0: [0, 2], 1: [0, 1]}

    def render(layer):
        for number in drawn[layer]:
            yield IMAGES[number : number + 1]

    assert scan.measure(render, lambda image: image, [0, 1]) == {0: 0.5, 1: 0.0}


def test_the_most_vital_layers_come_first():
    assert scan.most_vital({0: 0.1, 1: 0.4, 2: 0.4, 3: 0.2}, 3) == (1, 2, 3)


def test_chart_shows_the_highest_bar_tallest_and_vital_ones_in_full_colour():
    chart = scan.bar_chart({0: 0.5, 1: 0.1, 2: 0.2}, 2, (0,))
    assert chart.shape[0] == 1
    assert chart.shape[3] == 3
    middles = [scan.MARGIN + place * (scan.BAR + scan.GAP) + scan.BAR // 2 for place in range(3)]
    bars = [(chart[0, scan.MARGIN : scan.MARGIN + scan.HEIGHT, x] < 0.99).any(-1).sum() for x in middles]
    assert bars[0] > bars[2] > bars[1]
    full, pale = (
        chart[0, scan.MARGIN + scan.HEIGHT - 2, middles[0]],
        chart[0, scan.MARGIN + scan.HEIGHT - 2, middles[1]],
    )
    assert full.sum() < pale.sum()


def test_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "vital_layers.json"
    scan.check_writable(path)
    scan.write_scan(path, {"vital_layers": [1]})
    assert json.loads(path.read_text()) == {"vital_layers": [1]}
    assert [each.name for each in path.parent.iterdir()] == ["vital_layers.json"]


def test_a_path_that_cannot_be_written_is_told_first(tmp_path):
    with pytest.raises(ValueError, match="which is a folder"):
        scan.check_writable(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which cannot be written"):
        scan.check_writable(tmp_path / "file" / "vital_layers.json")


def test_features_are_flux_nanos_dinov2(nano):
    score = scan.DinoScore(nano.spec.dinov2, torch.device("cpu"))
    images = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    features = torch.cat([score.features(image[None]) for image in images])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))
    assert float((features[0] * features[1]).sum()) < 0.9999
