"""Tables of an evaluation."""

from flux.evaluate.summary import ResultRow, markdown, means, means_by_kind


def row(kind: str, **scores: float | None) -> ResultRow:
    return ResultRow("an item", kind, "a method", scores)


def test_means_leave_out_what_was_not_measured():
    rows = [
        row("add", success=1.0, psnr=30.0),
        row("add", success=1.0, psnr=20.0),
        row("time", success=0.0, psnr=40.0),
        row("time", success=None, psnr=None),
    ]
    assert means(rows) == {"success": 2 / 3, "psnr": 30.0, "both": 1 / 3}
    found = means_by_kind(rows)
    assert list(found) == ["all", "local", "add", "time"]
    assert found["add"]["both"] == 0.5
    assert found["time"]["psnr"] == 40.0
    assert found["local"] == found["add"]
    assert found["time"]["items"] == 2
    assert list(means_by_kind(rows[:2])) == ["all", "add"]


def test_the_table_means_by_kind():
    """A value that was not measured for a kind is shown as a dash."""
    rows = [
        row("add", success=1.0, overlap=0.5, psnr=30.0),
        row("time", success=1.0, overlap=0.5, psnr=None),
    ]
    shown = markdown({"x": means_by_kind(rows)}, ["success", "both", "overlap", "psnr"])
    assert "success / PSNR / and 25 dB / overlap by kind" in shown
    assert "| method | local | add | time |" in shown
    assert "| x | 1.00 / 30.00 / 1.00 / 0.50 | 1.00 / 30.00 / 1.00 / 0.50 | 1.00 / - / - / 0.50 |" in shown
