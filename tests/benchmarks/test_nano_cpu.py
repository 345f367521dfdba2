"""Times of flux-nano."""

import json

from benchmarks import nano_cpu


def test_nano_cpu(tmp_path, capsys):
    output = tmp_path / "results.json"
    nano_cpu.main(repeats=1, num_steps=2, size=64, output=str(output))
    results = json.loads(output.read_text())
    imports = ["import flux", "import flux.loaded_model"]
    assert list(results["seconds"]) == [*imports, "load", "an image", "a reference and 3 edits"]
    assert all(len(times) == 1 and times[0] > 0 for times in results["seconds"].values())
    assert "median" in capsys.readouterr().out
