"""The command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_nothing_to_begin_with_is_told_in_a_line(monkeypatch, capsys, tmp_path):
    from training.__main__ import parse

    monkeypatch.setattr("sys.argv", ["training", "text", "--begin", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert f"no exported files in {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    """torchrun with gloo on the CPU: every stage, and one set of files at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        [*command, "-m", "training", "all", "--toy", "--stretch", "0.5", "--folder", str(tmp_path)],
        cwd=ROOT, env=environment, check=True, timeout=600,
    )  # fmt: skip
    assert (tmp_path / "export.done").exists()
