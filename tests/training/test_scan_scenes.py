"""Vital layers by scenes of their own."""

import json

import pytest
from helpers.condition_models import SPECS, steered_pipe
from helpers.evaluation import SIDE
from PIL import Image

import training.scan_scenes as program
from flux.errors import InputError
from flux.loaded_model import LoadedModel
from flux.specs import configs
from flux.vital_layers import find_vital_layers

KINDS = ["tiny-kontext", "tiny-fill", "tiny-canny", "tiny"]


@pytest.fixture(params=KINDS)
def model(request, nano, monkeypatch) -> str:
    monkeypatch.setitem(configs, request.param, SPECS[request.param])
    pipe = steered_pipe(nano, request.param)
    monkeypatch.setattr(LoadedModel, "load", lambda settings: pipe)
    monkeypatch.setattr(program, "SIDE", SIDE)
    return request.param


def run(monkeypatch, model, folder) -> None:
    options = ["--count", "2", "--num_steps", "1", "--device", "cpu", "--folder", str(folder)]
    monkeypatch.setattr("sys.argv", ["x", "--model", model, *options])
    program.main()


def test_each_scene_steers_its_own_images(model, tmp_path, monkeypatch, capsys):
    run(monkeypatch, model, tmp_path)
    scan = json.loads((tmp_path / "vital_layers.json").read_text())
    assert scan["model"] == model
    assert scan["rows"] == 2
    assert len(scan["vitality"]) == 4
    assert "| layer | vitality |" in capsys.readouterr().out
    fields = {"tiny-kontext": "context", "tiny-fill": "fill", "tiny-canny": "control"}
    given = [json.loads((tmp_path / f"scene_0{n}" / "run.json").read_text())["settings"] for n in (0, 1)]
    assert given[0]["prompts"] != given[1]["prompts"]
    if model in fields:
        paths = [str(each[fields[model]]) for each in given]
        assert paths[0] != paths[1]
    if scan["vital_layers"]:
        found = find_vital_layers(str(tmp_path / "vital_layers.json"), SPECS[model])
        assert sorted(found) == scan["vital_layers"]


@pytest.mark.parametrize("model", ["tiny"], indirect=True)
def test_a_second_start_resumes(model, tmp_path, monkeypatch):
    """Nothing is made again, and a scan with other settings is not mixed in."""
    run(monkeypatch, model, tmp_path)
    before = (tmp_path / "vital_layers.json").read_text()
    image = tmp_path / "scene_01" / "prompt_000" / "reference.png"
    made = image.stat().st_mtime_ns
    run(monkeypatch, model, tmp_path)
    assert image.stat().st_mtime_ns == made
    assert (tmp_path / "vital_layers.json").read_text() == before
    assert Image.open(image).size == (SIDE, SIDE)
    monkeypatch.setattr("sys.argv", ["x", "--model", model, "--num_steps", "2", "--folder", str(tmp_path)])
    with pytest.raises(InputError, match="num_steps"):
        program.main()
