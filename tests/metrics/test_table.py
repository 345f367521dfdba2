"""The metrics by name."""

import numpy as np
import pytest

from flux.errors import InputError
from flux.metrics.features import Dino
from flux.metrics.pixels import MAX_PSNR
from flux.metrics.table import METRICS, load_metrics


def test_only_the_metrics_asked_for_are_loaded(monkeypatch):
    monkeypatch.setattr(Dino, "load", lambda *_: pytest.fail("loaded"))
    assert list(load_metrics(["ssim", "psnr"])) == ["ssim", "psnr"]
    with pytest.raises(InputError, match=r"unknown metric 'dine': expected some of dino, psnr"):
        load_metrics(["psnr", "dine"])


def test_a_skip_that_changes_nothing_has_no_vitality():
    for name, unchanged in {"dino": 1, "clip": 1, "ssim": 1, "lpips": 1, "psnr": MAX_PSNR}.items():
        assert METRICS[name].change(np.array([unchanged])) == 0
