"""Evaluations as a whole: what they write, and that they are resumed."""

import json

import numpy as np
import pytest
from helpers.evaluation import PROMPTS, SIDE, PaintingWorker, results, settings_of

from flux.errors import InputError
from flux.evaluate.benchmark import read_benchmark
from flux.evaluate.measure import Measurer
from flux.evaluate.run import evaluate
from flux.evaluate.settings import EvaluateSettings
from flux.images.io import read_image, read_metadata
from flux.metrics.edits import OUTSIDE
from flux.settings.files import check_settings


def test_a_method_the_model_cannot_do_is_told_before_any_work(benchmark, tmp_path, painting):
    methods = [{"name": "x"}, {"name": "too deep", "vital_layers": [99]}]
    with pytest.raises(InputError, match=r"method 'too deep'.*99"):
        evaluate(settings_of(benchmark, tmp_path / "out", methods=methods), progress=False)
    methods = [{"name": "no step", "inject_from": 0.3, "inject_until": 0.4}]
    with pytest.raises(InputError, match=r"method 'no step'.*none of which lies in"):
        evaluate(settings_of(benchmark, tmp_path / "out", methods=methods), progress=False)
    assert not painting
    assert not (tmp_path / "out").exists()


def test_a_judge_is_given_together_with_its_file(benchmark, tmp_path, painting):
    """The library loads no judge; the command that does is named."""
    settings = settings_of(benchmark, tmp_path / "out", judge="measuring.pt")
    with pytest.raises(InputError, match=r"judge measuring\.pt.* python -m training\.evaluate_edits"):
        evaluate(settings, progress=False)
    with pytest.raises(InputError, match="without the file it was made from"):
        evaluate(settings_of(benchmark, tmp_path / "out"), judge=object(), progress=False)
    assert not painting
    assert not (tmp_path / "out").exists()


def test_what_is_written(benchmark, tmp_path, painting):
    folder = evaluate(settings_of(benchmark, tmp_path), progress=False)
    rows = results(folder)
    keys = {item.key for item in read_benchmark(benchmark)}
    methods = {"autoencoder", "truth", "default", "img2img"}
    assert {(row["method"], row["item"]) for row in rows} == {(m, key) for m in methods for key in keys}
    assert len(rows) == 16
    # The truth differs from the photograph inside the mask alone.
    assert {float(row["psnr"]) for row in rows if row["method"] == "truth"} == {100.0}
    item = read_benchmark(benchmark)[0]
    before = np.asarray(item.photo(SIDE, SIDE), dtype=float)
    outside = ~np.asarray(item.mask(SIDE, SIDE))
    mse = np.square((before - before // 2)[outside] / 255).mean()
    [row] = [row for row in rows if (row["method"], row["item"]) == ("default", "000")]
    assert float(row["mse"]) == pytest.approx(mse)
    assert (float(row["seconds"]), float(row["evaluations"])) == (0.25, 7.0)
    assert read_metadata(folder / "default" / "000.png")["prompt"] == PROMPTS["replace"][1]
    assert read_image(folder / "sheet.png").width > 4 * SIDE
    summary = (folder / "summary.md").read_text()
    assert "| Default |" in summary
    assert "| method | replace | add |" in summary
    assert json.loads((folder / "run.json").read_text())["demo"] == "evaluate"
    assert check_settings(EvaluateSettings, json.loads((folder / "run.json").read_text())["settings"])


def test_a_second_start_makes_what_is_missing(benchmark, tmp_path, painting):
    folder = evaluate(settings_of(benchmark, tmp_path), progress=False)
    before = (folder / "results.csv").read_text()
    # The truth is no model's work. Three items, then the fourth.
    assert [(task.method, len(task.items)) for task in painting] == [
        (method, count) for count in (3, 1) for method in ("autoencoder", "default", "img2img")
    ]
    painting.clear()
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    assert not painting
    (folder / "default" / "002.png").unlink()
    lines = before.splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(line for line in lines if not line.startswith("001,add,img")))
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    done = {(task.method, *(item.key for item in task.items)) for task in painting}
    assert done == {("default", "002"), ("img2img", "001")}
    assert sorted((folder / "results.csv").read_text().splitlines()) == sorted(before.splitlines())


def test_stopped_and_started_again_is_the_same(benchmark, tmp_path, painting, monkeypatch):
    """Ctrl-C in the middle: what was made stays, and the rest is made as if nothing had happened."""
    whole = evaluate(settings_of(benchmark, tmp_path / "whole", batch_size=1), progress=False)
    calls, run = [], PaintingWorker.run

    def interrupted(self, task):
        calls.append(task)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return run(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(PaintingWorker, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings_of(benchmark, tmp_path / "cut", batch_size=1), progress=False)
    assert len(results(tmp_path / "cut")) == 4 + 5
    painting.clear()
    cut = evaluate(settings_of(benchmark, tmp_path / "cut", batch_size=1), progress=False)
    assert len(painting) == 12 - 5
    assert (cut / "summary.csv").read_text() == (whole / "summary.csv").read_text()


def test_methods_may_come_and_go(benchmark, tmp_path, painting):
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    painting.clear()
    other = {"methods": [{"name": "Paper", "dose": "paper"}]}
    evaluate(settings_of(benchmark, tmp_path, **other), progress=False)
    assert {task.method for task in painting} == {"paper"}
    assert {row["method"] for row in results(tmp_path)} >= {"default", "paper"}
    assert "Default" not in (tmp_path / "summary.md").read_text()
    # The name of the one that went still stands for it.
    with pytest.raises(InputError, match="differs in method 'Default'"):
        evaluate(settings_of(benchmark, tmp_path, methods=[{"name": "Default", "top": 1}]), progress=False)
    painting.clear()
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    assert not painting


def test_a_folder_of_other_settings_is_refused(benchmark, tmp_path, painting):
    evaluate(settings_of(benchmark, tmp_path), progress=False)
    with pytest.raises(InputError, match="differs in num_steps"):
        evaluate(settings_of(benchmark, tmp_path, num_steps=3), progress=False)
    evaluate(settings_of(benchmark, tmp_path, count=2, batch_size=8), progress=False)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(settings_of(benchmark, tmp_path), progress=False)


def test_other_measures_are_taken_from_the_pictures_there(benchmark, tmp_path, painting, monkeypatch):
    """The summary covers all rows, those left out this time too. Time and work stay; nothing is made."""
    settings = settings_of(
        benchmark, tmp_path, references="generated", methods=[{"name": "a"}, {"name": "b"}]
    )
    evaluate(settings, progress=False)
    before = results(tmp_path)
    painting.clear()
    other = settings.model_copy(
        update={"metrics": ("structure",), "methods": settings.methods[:1], "count": 2}
    )
    measured, rows = [], Measurer.rows
    monkeypatch.setattr(Measurer, "rows", lambda self, *given: measured.append(given) or rows(self, *given))
    for _ in range(2):
        evaluate(other, progress=False)
    assert not painting
    assert sum(len(items) for _, items, _ in measured) == 8
    after = results(tmp_path)
    assert all(float(row.pop("structure")) >= 0 for row in after)
    assert sorted(map(str, after)) == sorted(map(str, before))


def test_reconstruction_is_measured_everywhere(benchmark, tmp_path, painting):
    """Against the photograph itself, the part that an edit might change included, and without a truth."""
    folder = evaluate(settings_of(benchmark, tmp_path, reconstruct=True), progress=False)
    rows = results(folder)
    assert {row["method"] for row in rows} == {"autoencoder", "default", "img2img"}
    photo = np.asarray(read_benchmark(benchmark)[0].photo(SIDE, SIDE), dtype=float)
    assert float(rows[0]["mse"]) == pytest.approx(np.square((photo - photo // 2) / 255).mean())


def test_generated_references_are_what_edits_are_compared_with(benchmark, tmp_path, painting, monkeypatch):
    """Where the subject is, only a judge can say."""
    settings = settings_of(benchmark, tmp_path, references="generated", methods=[{"name": "Default"}])
    folder = evaluate(settings, progress=False)
    assert {(row["method"], row["psnr"]) for row in results(folder)} == {("default", "")}
    assert read_image(folder / "default" / "000_reference.png").size == (SIDE, SIDE)


def test_a_small_evaluation_of_the_model_itself(nano, benchmark, tmp_path):
    """Two items, two methods, two steps: the command's whole way."""
    settings = settings_of(benchmark, tmp_path, count=2, metrics=["structure"])
    folder = evaluate(settings, pipe=nano, progress=False)
    rows = results(folder)
    assert len(rows) == 8
    assert all(row[name] for row in rows for name in (*OUTSIDE, "structure"))
    scores = {row["method"]: float(row["psnr"]) for row in rows}
    assert scores["autoencoder"] > scores["img2img"]
