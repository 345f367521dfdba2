"""Evaluations with a judge."""

import pytest
import torch
from helpers.evaluation import PaintingWorker, settings_of

import flux.evaluate.run
from flux.evaluate.__main__ import main as evaluate_main
from flux.evaluate.resolve import resolve_evaluation
from flux.evaluate.store import Store
from training.evaluate_edits import load_judge, main
from training.loop.models import TOY
from training.stages.vision import MeasuringModel


@pytest.mark.parametrize("references", ["photo", "generated"])
def test_an_evaluation_with_a_judge(rendered_edits, judge_file, tmp_path, monkeypatch, references):
    """Photographs are measured by the benchmark's masks, generated references by the judge's."""
    monkeypatch.setattr(flux.evaluate.run, "EvaluateWorker", PaintingWorker)
    fields = {"methods": [{"name": "x"}], "references": references, "judge": str(judge_file), "count": 6}
    settings = settings_of(rendered_edits, tmp_path, **fields)
    with torch.inference_mode():
        folder = flux.evaluate.run.evaluate(settings, progress=False, judge=load_judge(settings))
    summary = (folder / "summary.md").read_text()
    assert "| x | " in summary
    assert "| success | and 25 dB | overlap | PSNR |" in summary


def test_another_judge_measures_again(rendered_edits, judge_file, tmp_path, monkeypatch):
    """Another model is another judge, whatever its file is called."""
    monkeypatch.setattr(flux.evaluate.run, "EvaluateWorker", PaintingWorker)
    fields = {"methods": [{"name": "x"}], "judge": str(judge_file), "count": 2}
    settings = settings_of(rendered_edits, tmp_path / "out", **fields)
    with torch.inference_mode():
        flux.evaluate.run.evaluate(settings, progress=False, judge=load_judge(settings))
    copy, other = (tmp_path / name for name in ("copy.pt", "other.pt"))
    copy.write_bytes(judge_file.read_bytes())
    torch.save({name: x.half() for name, x in MeasuringModel(TOY).state_dict().items()}, other)
    for judge, outdated in ((copy, False), (other, True)):
        again = resolve_evaluation(settings.model_copy(update={"judge": str(judge)}))
        assert Store(again).outdated == outdated


@pytest.mark.parametrize(
    ("command", "judge", "message"),
    [
        (main, {"judge": "nowhere.pt"}, "judge nowhere.pt, which is not there: python -m training measuring"),
        (evaluate_main, {"judge": "nowhere.pt"}, "start python -m training.evaluate_edits"),
    ],
)
def test_commands_without_their_judge_end_in_one_line(
    rendered_edits, tmp_path, capsys, command, judge, message
):
    with pytest.raises(SystemExit) as exit_:
        command("evaluate.json", benchmark=str(rendered_edits), output_dir=str(tmp_path / "out"), **judge)
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
