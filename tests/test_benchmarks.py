"""The benchmarks run, at toy size, and what they compare is the same model."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks import edit_photo, full_size, memory, nano_cpu  # noqa: E402
from benchmarks.peer import renamed  # noqa: E402
from benchmarks.stand_ins import random_transformer  # noqa: E402
from flux.specs import configs  # noqa: E402


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
    assert all(work.name in shown for work in full_size.toy_plan().work)
    assert list(configs) == known, "the toy model must not stay among the models"


def test_the_full_size_is_flux_dev():
    """1080x720 is rounded down, and the shapes that would be written are those of flux1-dev.safetensors."""
    plan = full_size.full_plan()
    assert plan.model == "flux-dev" and len(plan.layers) == 10
    assert {(work.width, work.height) for work in plan.work} == {(1024, 1024), (1072, 720)}
    weights = random_transformer(plan.spec.params, torch.device("meta"))
    assert sum(tensor.numel() for tensor in weights.values()) == 11_901_408_320
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_renaming_shares_memory():
    """Two transformers of 24 GB each would not fit on most cards: only the swapped modulation is a copy."""
    params = full_size.toy_plan().spec.params
    weights = random_transformer(params, torch.device("cpu"))
    own = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    copies = [name for name, tensor in renamed(weights, params.hidden_size).items()
              if tensor.untyped_storage().data_ptr() not in own]  # fmt: skip
    assert sorted(copies) == ["norm_out.linear.bias", "norm_out.linear.weight"]


def test_edit_photo_at_toy_size(tmp_path, capsys):
    output = tmp_path / "results.json"
    edit_photo.main(str(tmp_path), str(output), toy=True, device="cpu", num_steps=2, compiled=False)
    found = json.loads(output.read_text())["eager"]
    assert len(found) == 9 and all(each["seconds"] > 0 and each["pass_ms"] > 0 for each in found.values())
    assert found["inversion, kept in main memory"]["kept_gib"] > 0
    assert all(name in capsys.readouterr().out for name in ("edits of what is kept in device",))


def test_nano_cpu(tmp_path, capsys):
    output = tmp_path / "results.json"
    nano_cpu.main(repeats=1, num_steps=2, size=64, output=str(output))
    results = json.loads(output.read_text())
    imports = ["import flux", "import flux.pipeline"]
    assert list(results["seconds"]) == [*imports, "load", "a picture", "a reference and 3 edits"]
    assert all(len(times) == 1 and times[0] > 0 for times in results["seconds"].values())
    assert "median" in capsys.readouterr().out


def test_memory_at_toy_size(tmp_path, capsys):
    """Every way to hold the weights makes a picture and an edit, and each is in the table."""
    output = tmp_path / "results.json"
    memory.main(str(output), toy=True, device="cpu", caps=(24,))
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == 1 + len(memory.WAYS) + 1
    for name, found in cases.items():
        assert "error" not in found and found["picture_ms"] > 0, (name, found)
    shown = capsys.readouterr().out
    assert all(name in shown for name in cases)
