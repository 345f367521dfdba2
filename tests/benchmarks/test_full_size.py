"""The whole benchmark at toy size."""

import json

import torch

from benchmarks import full_size
from benchmarks.common import toy_plan
from flux.specs import configs


def test_full_size_at_toy_size(tmp_path, capsys):
    """Random files load as a model by path, ours and diffusers' do the same work, and the results say so."""
    output = tmp_path / "results.json"
    known = list(configs)
    full_size.main(str(tmp_path), output=str(output), toy=True, device="cpu", compiled=False)

    results = json.loads(output.read_text())
    assert results["load_s"] > 0
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert len(results["steps"]) == 7
    for name, found in results["steps"].items():
        assert found.get("step_ms", {}).get("median", 0) > 0, (name, found)
    # Float32 on the very same weights: a tensor under a wrong name would show.
    assert results["ours_to_diffusers"] < 1e-5

    shown = capsys.readouterr().out
    assert all(work.name in shown for work in toy_plan().work)
    assert list(configs) == known, "the toy model must not stay among the models"
