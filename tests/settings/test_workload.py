"""Each demo states how much work it gives to the models."""

import pytest

from flux.settings.demos import LayerSettings, ModelSettings, ScanSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.workload import Workload

EDIT = {"prompt": "a dog", "edits": ("a cat",)}


def test_plain_runs_sample_a_batch():
    assert ModelSettings(batch_size=3).workload() == Workload(3)
    assert LayerSettings(prompt="a dog").workload() == Workload(1)


@pytest.mark.parametrize(
    "settings", [SkipSettings(prompts=["a dog"]), ScanSettings(prompts=["a dog"], gap=True)]
)
def test_sweeps_keep_streams_and_decode_alongside(settings):
    assert settings.workload() == Workload(1, keeps_streams=True, decodes_alongside=True)


def test_edits_keep_kv_of_their_vital_layers():
    assert EditSettings(**EDIT, vital_layers=(1, 2)).workload().kept_layers == 2
    assert EditSettings(**EDIT).workload().kept_layers is None, "the number of the model's vital layers"


def test_sparse_edits_keep_kv_of_all_layers():
    """Where some edit has a mask, or finds one."""
    assert EditSettings(**EDIT).workload().keeps_all_layers
    assert EditSettings(**EDIT, dose="paper", mask="mask.png").workload().keeps_all_layers
    assert not EditSettings(**EDIT, sparse=False).workload().keeps_all_layers
    assert not EditSettings(**EDIT, mask="none").workload().keeps_all_layers
    assert not EditSettings(**EDIT, dose="paper").workload().keeps_all_layers


@pytest.mark.parametrize(
    ("fields", "finds_masks"),
    [
        ({}, True),
        ({"dose": "paper"}, False),
        ({"mask": "none"}, False),
        (
            {"dose": "paper", "edits": ({"prompt": "a cat", "then": ({"prompt": "x", "mask": "auto"},)},)},
            True,
        ),
    ],
)
def test_masks_are_found_if_any_edit_asks_for_it(fields, finds_masks):
    assert EditSettings(**{**EDIT, **fields}).workload().finds_masks is finds_masks


def test_photos_are_encoded():
    assert EditSettings(**EDIT, photo="photo.png").workload().encodes
    assert not EditSettings(**EDIT).workload().encodes
