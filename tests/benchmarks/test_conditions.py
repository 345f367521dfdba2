"""Steps of the tools that images steer, at toy size."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import conditions
from benchmarks.conditions import DIFFUSERS, TOOLS


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """Compiling takes most of the time, and other tests compile such blocks."""
    with torch.compiler.set_stance("force_eager"):
        yield


def measured(folder: Path, **options) -> dict[str, dict]:
    output = folder / "results.json"
    conditions.main(str(output), toy=True, device="cpu", **options)
    return json.loads(output.read_text())["cases"]


def test_conditions_at_toy_size(tmp_path, capsys):
    """diffusers' step of the same inputs is the same, in bfloat16; measured 0.006."""
    cases = measured(tmp_path, only="diffusers, eager")
    assert list(cases) == [f"{tool}, {way}" for tool in TOOLS for way in (DIFFUSERS, "eager")]
    for tool in TOOLS:
        assert cases[f"{tool}, eager"]["difference"] < 0.015
        assert cases[f"{tool}, eager"]["planned_gib"] > 0
    assert all(found["median_ms"] > 0 for found in cases.values())
    shown = capsys.readouterr().out
    assert all(f"| {name} " in shown for name in cases)


def test_every_way_of_one_tool(tmp_path):
    """Those in bfloat16 come first; with 8-bit floats a step moves by 0.03."""
    cases = measured(tmp_path, only="kontext")
    ways = (DIFFUSERS, "eager", "compiled", "fp8 compiled")
    assert list(cases) == [f"flux-dev-kontext, {way}" for way in ways]
    plain, eight_bits = cases["flux-dev-kontext, compiled"], cases["flux-dev-kontext, fp8 compiled"]
    assert plain["difference"] < 0.015 < eight_bits["difference"] < 0.06
    assert plain["planned_gib"] > eight_bits["planned_gib"]


def test_the_time_is_limited(tmp_path, capsys):
    assert list(measured(tmp_path, only="eager", minutes=0)) == ["flux-dev, eager"]
    assert "left out: flux-dev-kontext, eager; " in capsys.readouterr().out
