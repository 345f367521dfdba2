"""Whole runs of edits at toy size."""

import json

from benchmarks import whole_edits


def test_whole_edits_at_toy_size(tmp_path, capsys):
    """Sparse and whole steps, from the text to the pixels."""
    output = tmp_path / "results.json"
    whole_edits.main(output=str(output), rounds=1, toy=True, device="cpu", compiled=False)
    runs = json.loads(output.read_text())["runs"]
    assert list(runs) == ["ours, bf16", "ours, bf16, whole"]
    assert all(found["median_s"] > 0 for found in runs.values())
    assert "| ours, bf16, whole " in capsys.readouterr().out
