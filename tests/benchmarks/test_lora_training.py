"""Training steps at toy size."""

import json

import pytest

from benchmarks import lora_training

pytestmark = pytest.mark.gradients


def cases(tmp_path, **fields) -> dict[str, dict]:
    output = tmp_path / "results.json"
    lora_training.main(str(output), toy=True, device="cpu", **fields)
    return json.loads(output.read_text())["cases"]


def test_lora_training_at_toy_size(tmp_path, capsys):
    """Every base takes its steps. diffusers begins with our loss and trains as many matrices or more."""
    found = cases(tmp_path, caps=(24,), only="64x64 all layers")
    assert list(found) == [
        "bf16: 64x64 all layers",
        "bf16, checkpointed: 64x64 all layers",
        "diffusers, bf16: 64x64 all layers",
        "diffusers, bf16, checkpointed: 64x64 all layers",
        "8-bit floats, 24 GiB: 64x64 all layers",
        "4 bits, 24 GiB: 64x64 all layers",
    ]
    for name, case in found.items():
        assert "error" not in case, (name, case)
        assert len(case["ms"]) == lora_training.MEASURED
        assert case["median_ms"] > 0
        assert len(case["losses"]) == lora_training.WARM_UP + lora_training.MEASURED
    ours, again, theirs, _, eight, four = found.values()
    assert again["losses"] == pytest.approx(ours["losses"], rel=1e-6)
    assert theirs["relative_loss"] == pytest.approx(1, abs=1e-5)
    # Where diffusers has several matrices for one of ours, each has a first factor of its own.
    assert ours["parameters"] < theirs["parameters"] < 1.2 * ours["parameters"]
    assert four["forecast_gib"] < eight["forecast_gib"] < ours["forecast_gib"]
    assert "| 4 bits, 24 GiB: 64x64 all layers" in capsys.readouterr().out


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lora_training, "add_adapters", fail)
    found = cases(tmp_path, only="64x64 vital layers", caps=())
    assert found["bf16: 64x64 vital layers"]["error"] == "RuntimeError: out of memory"
    assert found["diffusers, bf16: 64x64 vital layers"]["median_ms"] > 0
    assert "RuntimeError: out of memory |" in capsys.readouterr().out
