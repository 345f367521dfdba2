"""A scan at toy size."""

import json

from benchmarks import scan


def test_scan_at_toy_size(tmp_path, capsys):
    output = tmp_path / "results.json"
    scan.main(str(tmp_path), toy=True, output=str(output))
    found = json.loads(output.read_text())["one_process"]
    assert 0 < found["waiting"] < 1
    assert f"the denoiser waits {100 * found['waiting']:.1f}% of a scan's time" in capsys.readouterr().out
