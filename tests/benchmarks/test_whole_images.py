"""Whole images at toy size."""

import json

import pytest

from benchmarks import whole_images


@pytest.mark.filterwarnings("ignore:.*should be kept in float32")
def test_whole_images_at_toy_size(tmp_path, capsys):
    """From the text to the pixels, by both."""
    output = tmp_path / "results.json"
    whole_images.main(output=str(output), rounds=1, toy=True, device="cpu", compiled=False)
    images = json.loads(output.read_text())["images"]
    assert list(images) == ["ours, bf16", "diffusers, bf16"]
    assert all(found["median_s"] > 0 for found in images.values())
    assert set(images["ours, bf16"]["parts_s"]) == {"text", "denoise", "decode"}
    assert "| diffusers, bf16 " in capsys.readouterr().out
