"""The benchmarks run, at toy size, and what they compare is the same model."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

pytest.importorskip("diffusers")

from benchmarks import edit_photo, full_size, memory, nano_cpu, scan  # noqa: E402
from benchmarks.diffusers_peer import peer_transformer, renamed  # noqa: E402
from benchmarks.random_weights import random_transformer  # noqa: E402
from flux.modules.linear import PackedLinear  # noqa: E402
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
    assert plan.model == "flux-dev"
    assert len(plan.layers) == 10
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
    assert len(found) == 9
    assert all(each["seconds"] > 0 and each["pass_ms"] > 0 for each in found.values())
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


def test_scan_at_toy_size(tmp_path, capsys):
    output = tmp_path / "results.json"
    scan.main(str(tmp_path), toy=True, output=str(output))
    found = json.loads(output.read_text())["one_process"]
    assert 0 < found["waiting"] < 1
    assert f"the denoiser waits {100 * found['waiting']:.1f}% of a scan's time" in capsys.readouterr().out


def test_parallel_at_toy_size(tmp_path):
    """It starts two processes itself, of which one writes and prints."""
    output = tmp_path / "results.json"
    toy = ("--toy", "--device", "cpu", "--cards", "2", "--compiled=False", "--output", str(output))
    command = [sys.executable, "-m", "benchmarks.parallel", *toy]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text())
    assert results["cards"] == 2
    for name, found in results["steps"]["eager"].items():
        # In bfloat16, where a number more or less rounded differs by 0.004.
        assert found["one card"]["ms"] > 0
        assert found["shared"]["ms"] > 0
        assert found["difference"] < 0.02
        assert done.stdout.count(f"| {name}, eager ") == 1


def test_memory_at_toy_size(tmp_path, capsys):
    """Every way to hold the weights makes a picture and an edit, and each is in the table."""
    output = tmp_path / "results.json"
    memory.main(str(output), toy=True, device="cpu", caps=24)
    cases = json.loads(output.read_text())["cases"]
    assert len(cases) == 2 * len(memory.FORMS) + 2 + 3
    for name, found in cases.items():
        assert "error" not in found and found["picture_ms"] > 0, (name, found)
    planned = {form.name: cases[form.name]["planned_gib"] for form in memory.FORMS}
    assert planned["GGUF Q4_K"] < planned["GGUF Q8_0"] < planned["fp8 file"] < planned["bf16"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in cases)


def test_memory_goes_on_where_it_was(tmp_path, capsys):
    output = tmp_path / "results.json"
    toy_size = {"output": str(output), "toy": True, "device": "cpu", "caps": ()}
    memory.main(**toy_size, minutes=0)
    assert not output.exists()
    assert "left for the next run" in capsys.readouterr().out
    memory.main(**toy_size, only="Q4_K")
    first = json.loads(output.read_text())
    assert list(first["cases"]) == ["GGUF Q4_K", "diffusers, GGUF Q4_K"]
    memory.main(**toy_size, only=("diffusers, GGUF", "8 bits"))
    again = json.loads(output.read_text())
    assert list(again["cases"]) == [*first["cases"], "8 bits", "diffusers, GGUF Q8_0"]
    assert first["cases"].items() <= again["cases"].items()


@pytest.mark.parametrize("kind", ["F8_E4M3", "Q8_0", "Q4_K"])
def test_packed_weights_are_like_plain_ones(kind):
    """Else activations grow beyond numbers, or vanish."""
    drawn = memory.Packed.draw(kind, torch.Size((256, 1024)), 0.02, torch.device("cpu"))
    matrix = PackedLinear(drawn.rows, drawn.kind, None, drawn.scale, torch.float32).weight
    assert matrix.shape == (256, 1024)
    assert abs(matrix.mean()) < 0.002
    assert matrix.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_packed_weights_are_the_same_in_diffusers(kind):
    cpu, params = torch.device("cpu"), full_size.toy_plan().spec.params
    spec = replace(full_size.toy_plan().spec, params=replace(params, **memory.WIDTH_TOY))
    nets = memory.Nets(spec, cpu, torch.float32, memory.T5_TOY, memory.CLIP_TOY).packed(kind)
    given = tiny_models.inputs(1, params=spec.params)
    peer = peer_transformer(nets.plain.build("transformer"))
    memory.pack_as_gguf(peer, nets, cpu)
    # diffusers expands in half precision.
    assert (
        tiny_models.relative_error(tiny_models.ask_diffusers(peer, given), nets.build("transformer")(**given))
        < 1e-3
    )
