"""The files that a scored sweep leaves."""

import json

import numpy as np
import pytest
from helpers.scores import TABLE, scattered

from flux.errors import InputWarning
from flux.scan.publish import write_scores
from flux.scan.scores import Rule, Scores
from flux.specs import configs
from flux.vital_layers import find_vital_layers


def write(folder, scores, rule, **more) -> dict:
    given = {"model": "flux-nano", "checkpoint": "sha256:12ab", "protocol": {"prompts": ["é"] * 64}}
    layers = write_scores(folder, scores, rule, **{**given, **more})
    data = json.loads((folder / "vital_layers.json").read_text(encoding="utf-8"))
    assert layers == data["vital_layers"] == scores.vital(rule)
    return data


def test_files_of_the_scores(tmp_path):
    scores = scattered([0.9, 0.1, 0.7], 10, 0.01, [(0,), (2,), (0, 2)])
    scores.tables["psnr"] = scores.tables["dino"] * 50
    data = write(tmp_path / "new", scores, Rule(gap=True), sources={"dino": "facebook/dinov2-giant"})
    assert (tmp_path / "new" / "similarity.csv").read_text() == scores.csv()
    assert (data["model"], data["checkpoint"]) == ("flux-nano", "sha256:12ab")
    assert (data["format"], data["num_double"], data["num_single"]) == (2, 5, 10)
    assert data["rule"] == {"metric": "dino", "gap": True}
    assert data["rows"] == 10
    assert data["stable"] is True
    assert data["stable_after"] == 8
    low, high = scores.intervals()[(0,)]
    vitality = scores.vitality()[(0,)]
    assert data["vitality"]["00"] == {"vitality": vitality, "low": low, "high": high, "membership": 1.0}
    assert data["vitality"]["00-02"].keys() == {"vitality", "low", "high"}
    assert data["vitality_by_other_metrics"]["psnr"]["02"] == scores.vitality("psnr")[(2,)]
    assert data["agreement"] == {"dino": {"psnr": 1.0}}
    assert data["nets"] == {"dino": "facebook/dinov2-giant"}
    assert data["protocol"]["prompts"] == ["é"] * 64
    assert find_vital_layers(str(tmp_path / "new" / "vital_layers.json"), configs["flux-nano"]) == (0,)


def test_few_prompts_say_no_more_than_they_can(tmp_path):
    data = write(tmp_path, TABLE, Rule(threshold=0.15))
    assert data["vitality"]["00"] == {"vitality": 0.2}
    assert data["stable"] is False
    assert data["stable_after"] is None


@pytest.mark.parametrize(
    ("scores", "rule", "why"),
    [
        (TABLE, Rule(threshold=0.5), "the highest vitality is 0.4, and the threshold is 0.5"),
        (Scores([(1, 2)], {"dino": np.array([[0.1]])}), Rule(top=1), "one by one, not among sets"),
    ],
)
def test_a_scan_says_why_no_layer_is_vital(tmp_path, scores, rule, why):
    with pytest.warns(InputWarning, match=f"No layer is vital: .*{why}"):
        write(tmp_path, scores, rule)


def test_a_person_can_read_the_file(tmp_path):
    """A line for each layer, none beyond an editor's width."""
    write(tmp_path, scattered(np.linspace(0, 1, 57), 16, 0.1), Rule(top=40))
    lines = (tmp_path / "vital_layers.json").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 110
    assert sum('"membership"' in line for line in lines) == 57
