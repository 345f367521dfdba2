"""The command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.__main__ import NEEDS, missing_stages, parse
from training.loop.plan import STAGES

ROOT = Path(__file__).parents[2]


def test_nothing_to_begin_with_is_told_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["training", "text", "--begin", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert f"no exported files in {tmp_path}" in capsys.readouterr().err


def test_a_toy_does_not_begin_with_exported_files(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training", "kontext", "--toy", "--begin", "flux/assets/nano"])
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "lacks"),
    [
        (["measuring"], "tokenizers"),
        (["text", "flow128"], "tokenizers, autoencoder"),
        (["schnell", "export"], "tokenizers, autoencoder, guidance"),
    ],
)
def test_a_stage_without_those_that_it_needs_is_told_in_a_line(stages, lacks, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["training", *stages, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        parse()
    assert f"{tmp_path} lacks the results of {lacks}: name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "begins"), [(["all"], False), (["text", "flow256"], True), (["dinov2"], False)]
)
def test_stages_that_have_what_they_need(wanted, begins, tmp_path):
    (tmp_path / "tokenizers.done").touch()
    assert missing_stages(wanted, tmp_path, begins) == []


def test_every_stage_but_the_first_needs_another():
    assert STAGES[0] == "tokenizers"
    assert set(NEEDS) == set(STAGES) - {"tokenizers"}


@pytest.mark.parametrize("text", ["0", "-1", "nan", "x"])
@pytest.mark.parametrize("option", ["--minutes", "--stretch"])
def test_times_are_above_zero(option, text, monkeypatch, capsys, tmp_path):
    """A stage that is stretched to nothing would be taken for complete."""
    monkeypatch.setattr("sys.argv", ["training", "all", "--folder", str(tmp_path), option, text])
    with pytest.raises(SystemExit) as stop:
        parse()
    assert stop.value.code == 2
    assert f"{option}: got {text}, expected a number above 0" in capsys.readouterr().err


def test_samples_without_their_files_are_told_in_a_line(monkeypatch, capsys, tmp_path):
    from training.evaluate import main

    monkeypatch.setattr("sys.argv", ["training.evaluate", "samples", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"samples needs {tmp_path}/assets/transformer.safetensors and" in capsys.readouterr().err


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
