"""The notebook in examples/. CI also runs it as it is: python -m pytest --nbmake examples."""

import ast
import json
from dataclasses import replace

import pytest

from flux.results import Result
from flux.settings.files import CONFIGS
from flux.specs import configs

NOTEBOOK = CONFIGS.parent / "examples" / "stable_flow.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_small_and_without_outputs(cells):
    """Outputs would age unseen."""
    assert NOTEBOOK.stat().st_size < 300 * 1024
    assert all(cell["outputs"] == [] for cell in cells if cell["cell_type"] == "code")


def test_every_cell_runs_on_small_images(cells, loads_once, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(configs, "flux-nano", replace(configs["flux-nano"], num_steps=2, size=64))
    names, shown = {}, {}
    for cell in cells:
        if cell["cell_type"] == "code":
            *body, last = ast.parse("".join(cell["source"]).replace("num_steps=10", "num_steps=1")).body
            exec(compile(ast.Module(body, []), cell["id"], "exec"), names)
            shown[cell["id"]] = eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)
    results = [value for value in shown.values() if isinstance(value, Result)]
    assert len(results) == 6
    assert all(result._repr_png_().startswith(b"\x89PNG") for result in results)
    assert (tmp_path / "output" / "notebook" / "edit" / "run.json").is_file()
