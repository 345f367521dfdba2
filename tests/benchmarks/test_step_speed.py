"""Variants of a step at toy size."""

import json

from benchmarks import step_speed


def test_step_speed_at_toy_size(tmp_path, capsys):
    """Ours and diffusers' step are the same, in bfloat16."""
    output = tmp_path / "results.json"
    step_speed.main(str(output), toy=True, device="cpu", backend="eager", only="eager,kept reference")
    steps = json.loads(output.read_text())["steps"]
    assert list(steps) == [
        "ours eager",
        "ours eager, modulations in advance",
        "diffusers eager",
        "edit of a kept reference",
        "fp8 eager",
        "fp8 edit of a kept reference",
    ]
    assert all(found["median_ms"] > 0 for found in steps.values())
    assert steps["diffusers eager"]["error to ours eager"] < 0.02
    assert "attention, torch's choice" in capsys.readouterr().out
