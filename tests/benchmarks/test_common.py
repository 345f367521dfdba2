"""The plan of the full size."""

import ast
from pathlib import Path

import pytest
import torch

from benchmarks import common, conditions, edit_photo, full_size, memory, scan, step_speed
from benchmarks.common import full_plan, names_with
from benchmarks.random_weights import random_transformer
from flux.errors import InputError


def test_the_full_size_is_flux_dev():
    """1080x720 is rounded down, and the shapes that would be written are those of flux1-dev.safetensors."""
    plan = full_plan()
    assert plan.model == "flux-dev"
    assert len(plan.layers) == 10
    assert {(work.width, work.height) for work in plan.work} == {(1024, 1024), (1072, 720)}
    weights = random_transformer(plan.spec.params, torch.device("meta"))
    assert sum(tensor.numel() for tensor in weights.values()) == 11_901_408_320
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (conditions, []),
        (edit_photo, ["files"]),
        (full_size, ["files"]),
        (memory, []),
        (scan, ["files"]),
        (step_speed, []),
    ],
)
def test_the_full_size_without_a_gpu_is_refused(module, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        module.main(*arguments)
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: Got the device ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", sorted(Path(common.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_published_results_are_not_overwritten_by_default(path):
    """No benchmark names their folder, except in its docstring."""
    code = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(code, clean=False)
    texts = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    assert not [x for x in texts if isinstance(x, str) and x != docstring and "benchmarks/results" in x]
    assert "__file__" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("only", "found"),
    [
        ("", ["eager", "fp8", "fp8, compiled"]),
        ("fp8", ["fp8", "fp8, compiled"]),
        ("ea, comp", ["eager", "fp8, compiled"]),
    ],
)
def test_names_with_texts(only, found):
    assert names_with(["eager", "fp8", "fp8, compiled"], only) == found


def test_a_text_in_no_name_is_refused():
    with pytest.raises(InputError, match="Got only 'fp9', which none of these contains: eager; fp8"):
        names_with(["eager", "fp8"], "fp9")
