"""A scan that reports its progress, as a page does that shows it."""

import pytest
from helpers.sweep import SETTINGS, image_names

from flux.errors import Stopped
from flux.metrics.pixels import Psnr
from flux.scan.run import ScanProgress, scan
from flux.settings.complete import resolve
from flux.settings.demos import ScanSettings
from flux.settings.resolved import ResolvedScan


def settings(folder, **changes) -> ResolvedScan:
    fields = {**SETTINGS, "top": 1, "num_steps": 1, "metrics": ["psnr"], "output_dir": str(folder), **changes}
    return resolve(ScanSettings(**fields))


def run(pipe, folder, on_progress=None, **changes) -> list[int]:
    metrics = {"psnr": Psnr()}
    return scan(settings(folder, **changes), pipe, progress=False, on_progress=on_progress, metrics=metrics)


@pytest.fixture(autouse=True)
def draw_always(monkeypatch):
    monkeypatch.setattr("flux.scan.run.REDRAW_SECONDS", -1.0)


@pytest.mark.parametrize("size", [1, 3])
def test_scores_grow_to_those_of_the_whole_scan(nano, tmp_path, size):
    """Each batch is reported once, with the means so far; the files are those of a scan without reports."""
    reports: list[ScanProgress] = []
    found = run(nano, tmp_path / "reported", reports.append, batch_size=size)
    assert [report.done for report in reports] == {
        1: list(range(1, 9)), 3: [3, 4, 7, 8]
    }[size]  # fmt: skip
    assert {report.total for report in reports} == {8}
    images = [path for report in reports for path in report.new_images]
    assert {str(path.relative_to(tmp_path / "reported")) for path in images} == image_names(
        tmp_path / "reported"
    )
    assert len(set(images)) == len(images)
    assert set(reports[-1].vitality) == {(0,), (12,), (5,)}
    assert reports[-1].plot == tmp_path / "reported" / "vitality.png"
    assert found == run(nano, tmp_path / "quiet", batch_size=size)
    for name in ("similarity.csv", "vital_layers.json"):
        quiet, reported = ((tmp_path / folder / name).read_text() for folder in ("quiet", "reported"))
        assert quiet.replace("quiet", "reported") == reported


def test_nothing_is_drawn_before_there_is_a_score(nano, tmp_path):
    """The first image is a reference."""
    reports: list[ScanProgress] = []
    run(nano, tmp_path, reports.append)
    assert (reports[0].vitality, reports[0].plot) == ({}, None)
    assert list(reports[1].vitality) == [(0,)]


def test_a_report_may_end_the_scan_and_it_resumes(nano, tmp_path):
    """Images of the first start are reported again, and not made again."""

    def stop(report: ScanProgress) -> None:
        if report.done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(nano, tmp_path, stop)
    assert not (tmp_path / "vital_layers.json").exists()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in image_names(tmp_path)}
    assert len(before) == 3
    reports: list[ScanProgress] = []
    run(nano, tmp_path, reports.append)
    assert [report.done for report in reports] == list(range(1, 9))
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in before.items())


def test_the_files_show_other_settings_if_asked_to(nano, tmp_path):
    shown = {**settings(tmp_path).to_json(), "weights": "mine.safetensors"}
    scan(settings(tmp_path), nano, progress=False, metrics={"psnr": Psnr()}, shown_settings=shown)
    assert "mine.safetensors" in (tmp_path / "vital_layers.json").read_text()
    assert "mine.safetensors" in (tmp_path / "report.html").read_text()
    assert "mine.safetensors" not in (tmp_path / "run.json").read_text()
