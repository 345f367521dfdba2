"""The numbers of the memory table are those that the benchmark has written."""

import json
import re

import pytest
from helpers.markdown import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "h200-memory.json"
CASES = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
PAGE = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| \d+ GB", line)
]


def case_of(gpu, form):
    """The measured case of a row: all on the GPU, or under a cap of the GPU's size."""
    return CASES[form] if "and more" in gpu else CASES[f"{form}, {gpu.removesuffix(' GB')} GiB"]


def test_there_are_rows():
    assert len(ROWS) > 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}, {row[1]}")
def test_row(row):
    gpu, form, placed, peak, step, edit = row
    case = case_of(gpu, form)
    assert (peak, step, edit) == (
        f"{case['peak_gib']:.1f}",
        f"{case['image_ms']:.0f}",
        f"{case['edit_ms']:.0f}",
    )
    blocks = re.match(r"\d+", placed)
    assert (int(blocks[0]) if blocks else 0) == case["streamed"]
    assert ("T5" in placed) == bool(case["streamed_t5"])
