"""Every way to hold the weights, at toy size."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_models

from benchmarks import memory
from benchmarks.common import toy_plan
from benchmarks.diffusers_models import diffusers_transformer
from benchmarks.random_models import CLIP_TOY, T5_TOY, Packed, RandomModels
from flux.modules.linear import PackedLinear


def test_memory_at_toy_size(tmp_path, capsys):
    """Every way to hold the weights makes an image and an edit, and each is in the table."""
    output = tmp_path / "results.json"
    memory.main(str(output), toy=True, device="cpu", caps=(24,))
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == 2 * len(memory.FORMS) + 2 + 3
    for name, found in cases.items():
        assert "error" not in found, (name, found)
        assert found["image_ms"] > 0, (name, found)
    planned = {form.name: cases[form.name]["planned_gib"] for form in memory.FORMS}
    assert planned["GGUF Q4_K"] < planned["GGUF Q8_0"] < planned["fp8 file"] < planned["bf16"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in cases)


def test_memory_resumes(tmp_path, capsys):
    output = tmp_path / "results.json"
    toy_size = {"output": str(output), "toy": True, "device": "cpu", "caps": ()}
    memory.main(**toy_size, minutes=0)
    assert not output.exists()
    assert "left for the next run" in capsys.readouterr().out
    memory.main(**toy_size, only="Q4_K")
    first = json.loads(output.read_text())
    assert list(first["cases"]) == ["GGUF Q4_K", "diffusers, GGUF Q4_K"]
    memory.main(**toy_size, only="8 bits")
    again = json.loads(output.read_text())
    assert list(again["cases"]) == [*first["cases"], "8 bits"]
    assert first["cases"].items() <= again["cases"].items()


@pytest.mark.parametrize("kind", ["F8_E4M3", "Q8_0", "Q4_K"])
def test_packed_weights_are_like_plain_ones(kind):
    """Else activations grow beyond numbers, or vanish."""
    drawn = Packed.draw(kind, torch.Size((256, 1024)), 0.02, torch.device("cpu"))
    matrix = PackedLinear(drawn.rows, drawn.kind, None, drawn.scale, torch.float32).weight
    assert matrix.shape == (256, 1024)
    assert abs(matrix.mean()) < 0.002
    assert matrix.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_packed_weights_are_the_same_in_diffusers(kind):
    cpu, params = torch.device("cpu"), toy_plan().spec.params
    spec = replace(toy_plan().spec, params=replace(params, **memory.WIDTH_TOY))
    models = RandomModels(spec, cpu, torch.float32, T5_TOY, CLIP_TOY).packed(kind)
    given = tiny_models.inputs(1, params=spec.params)
    theirs = diffusers_transformer(models.plain.build("transformer"))
    memory.pack_as_gguf(theirs, models, cpu)
    # diffusers expands in half precision.
    assert (
        tiny_models.relative_error(
            tiny_models.ask_diffusers(theirs, given), models.build("transformer")(**given)
        )
        < 1e-3
    )
