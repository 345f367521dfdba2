"""Edits of a photograph at toy size."""

import json

from benchmarks import edit_photo


def test_edit_photo_at_toy_size(tmp_path, capsys):
    output = tmp_path / "results.json"
    edit_photo.main(str(tmp_path), str(output), toy=True, device="cpu", num_steps=2, compiled=False)
    found = json.loads(output.read_text())["eager"]
    assert len(found) == 9
    assert all(each["seconds"] > 0 and each["pass_ms"] > 0 for each in found.values())
    assert found["inversion, kept in main memory"]["kept_gib"] > 0
    assert all(name in capsys.readouterr().out for name in ("edits of what is kept in device",))
