"""Two processes share a step."""

import json
import subprocess
import sys
from pathlib import Path


def test_parallel_at_toy_size(tmp_path):
    """It starts two processes itself, of which one writes and prints."""
    output = tmp_path / "results.json"
    toy = ("--toy", "--device", "cpu", "--gpus", "2", "--compiled=False", "--output", str(output))
    command = [sys.executable, "-m", "benchmarks.parallel", *toy]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert results["gpus"] == 2
    for name, found in results["steps"]["eager"].items():
        # In bfloat16, where a number more or less rounded differs by 0.004.
        assert found["one GPU"]["ms"] > 0
        assert found["shared"]["ms"] > 0
        assert found["difference"] < 0.02
        assert done.stdout.count(f"| {name}, eager ") == 1
