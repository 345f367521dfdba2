"""Sparse steps at toy size."""

import json

from benchmarks import sparse_edit


def test_sparse_edit_at_toy_size(tmp_path, capsys):
    """A sparse step is a whole one with all else held, in bfloat16; measured 0.003."""
    output = tmp_path / "results.json"
    sparse_edit.main(str(output), toy=True, device="cpu", backend="eager", only="eager")
    results = json.loads(output.read_text())
    assert results["sparse to whole, held"] < 0.01
    names = [name.removeprefix("eager: an edit, ") for name in results["steps"]]
    assert names[:5] == ["whole", "8 tokens", "4 tokens", "2 tokens", "4 tokens, injecting"]
    assert all(found["median_ms"] > 0 for found in results["steps"].values())
    assert "| a reference and 3 edits, 4 tokens each" in capsys.readouterr().out
