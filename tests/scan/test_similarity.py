"""Similarities of the images in a sweep's folder."""

import json

import numpy as np
import pytest
from PIL import Image

from flux.errors import InputError
from flux.metrics.table import load_metrics
from flux.runs.record import run_record
from flux.scan.similarity import score
from flux.scan.sweep import image_path
from flux.settings.complete import resolve
from flux.settings.demos import SkipSettings

SETTINGS = {"prompts": ["a", "b"], "layers": [3, 0], "width": 32, "height": 32, "output_dir": ""}


@pytest.fixture
def folder(tmp_path):
    """A finished sweep: the first prompt's reference with noise of 0 and 1/5 of the range, the other's
    images equal.
    """
    settings = resolve(SkipSettings(**{**SETTINGS, "output_dir": str(tmp_path)}))
    for number in (0, 1):
        (tmp_path / f"prompt_{number:03d}").mkdir()
        for layers, value in (((), 0), ((3,), 51 * (1 - number)), ((0,), 0)):
            Image.new("RGB", (32, 32), (value,) * 3).save(image_path(tmp_path, number, layers))
    (tmp_path / "run.json").write_text(json.dumps(run_record(settings)))
    return tmp_path


def test_scores_of_a_folder(folder, monkeypatch):
    """In the order of the sets, whatever the number of images in memory at once."""
    for chunk in (32, 1):
        monkeypatch.setattr("flux.scan.similarity.CHUNK", chunk)
        scores = score(folder, load_metrics(["psnr", "ssim"]), progress=False)
        assert scores.layer_sets == [(3,), (0,)]
        assert scores.prompts == ["a", "b"]
        assert scores.tables["psnr"].tolist() == [[round(20 * np.log10(5), 6), 100], [100, 100]]
        assert scores.vitality() == {(3,): 0.1, (0,): 0}
        assert scores.tables["ssim"].argmin() == 0
        assert scores.tables["ssim"][1].tolist() == [1, 1]


def test_rows_of_one_prompt_are_known_as_such(folder):
    settings = resolve(SkipSettings(**{**SETTINGS, "prompts": ["a"], "seeds": 2, "output_dir": str(folder)}))
    (folder / "run.json").write_text(json.dumps(run_record(settings)))
    scores = score(folder, load_metrics(["psnr"]), progress=False)
    assert scores.prompts == ["a", "a"]
    assert scores.num_rows == 2


def test_images_of_unequal_size(folder):
    Image.new("RGB", (16, 48)).save(image_path(folder, 1, (0,)))
    with pytest.raises(InputError, match=r"unequal size: .*prompt_001.*skip_00.png has 16x48.*32x32"):
        score(folder, load_metrics(["psnr"]), progress=False)


def test_a_damaged_image_is_named_with_what_to_do(folder):
    image_path(folder, 1, (0,)).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"prompt_001.*skip_00.png.*Delete it and run the sweep again"):
        score(folder, load_metrics(["psnr"]), progress=False)


def test_an_unfinished_sweep_is_not_scored(folder):
    image_path(folder, 1, (0,)).unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its 6 images.*skip_00.png"):
        score(folder, load_metrics(["psnr"]), progress=False)
