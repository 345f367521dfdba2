"""A de-distilled dev: a file like schnell's, with dev's schedule and true CFG, at every door."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import weight_files

from flux.errors import InputError, InputWarning
from flux.images.io import read_metadata
from flux.loaded_model import LoadedModel
from flux.runtime.estimate import MemoryEstimator
from flux.sessions.batches import generate_all
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.specs import NANO_FOLDER, configs, get_spec
from flux.util import load_flow_model
from flux.weights.find import find_model
from flux.weights.hub import own_file
from flux.weights.load import read_weights

ROOT = Path(__file__).parents[2]
NAME = "flux-dev-de-distilled"
SMALL = ("--width", "64", "--height", "64", "--num_steps", "2")


def test_its_numbers():
    spec, dev, schnell = get_spec(NAME), configs["flux-dev"], configs["flux-schnell"]
    assert spec.params == schnell.params
    assert (spec.shifted, spec.text_length, spec.num_steps) == (True, dev.text_length, dev.num_steps)
    assert (spec.true_cfg, dev.true_cfg) == (3.5, 1.0)
    settings = resolve(ModelSettings(model=NAME))
    assert (settings.true_cfg, settings.negative_prompt) == (3.5, "")
    assert resolve(ModelSettings(model=NAME, true_cfg=1)).true_cfg == 1


def test_without_a_file_it_says_how_to_give_one(monkeypatch):
    monkeypatch.delenv("FLUX_MODEL", raising=False)
    with pytest.raises(InputError, match="as weights or in FLUX_DEV_DE_DISTILLED"):
        find_model(ModelSettings(model=NAME))
    with pytest.raises(InputError, match="there are several for this model"):
        own_file(get_spec(NAME), "", download=False)


@pytest.fixture
def twin(monkeypatch, tmp_path) -> Path:
    """A twin with flux-nano's sizes: its file, which the environment names."""
    nano = configs["flux-nano"]
    sizes = {
        name: getattr(nano, name) for name in ("ae_params", "size", "text_length", "clip_length", "dinov2")
    }
    params = replace(nano.params, guidance_embed=False)
    monkeypatch.setitem(configs, NAME, replace(get_spec(NAME), params=params, folder=NANO_FOLDER, **sizes))
    weights = read_weights(NANO_FOLDER / nano.repo_flow, "cpu", torch.float32)
    weights = {name: x for name, x in weights.items() if "guidance_in" not in name}
    path = weight_files.save(weights, tmp_path / "consolidated.safetensors")
    monkeypatch.setenv("FLUX_DEV_DE_DISTILLED", str(path))
    return path


def start(monkeypatch, program: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    if program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize(
    ("program", "given"),
    [
        ("demo_0_test.py", {"prompts": ["a dog"], "offload": "auto"}),
        ("demo_1_layer.py", {"prompt": "a dog", "layers": [0]}),
        ("demo_2_skip.py", {"prompts": ["a dog"], "layers": [3]}),
        ("demo_4_edit.py", {"prompt": "a dog", "edits": ["a cat"], "vital_layers": [0, 4], "mask": "none"}),
        ("flux.scan", {"prompts": ["a dog"], "layers": [3, 5], "top": 1, "stop_when": "never"}),
    ],
)
def test_programs(twin, tmp_path, monkeypatch, program, given):
    (tmp_path / "settings.json").write_text(json.dumps({"model": NAME, **given}))
    start(monkeypatch, program, tmp_path / "settings.json", *SMALL, "--output_dir", tmp_path / "out")
    if program != "flux.scan":
        assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["true_cfg"] == 3.5
    assert list((tmp_path / "out").rglob("*.png"))


def test_upstreams_command(twin, tmp_path, monkeypatch):
    arguments = ("--name", NAME, "--prompt", "a dog", *SMALL, "--output_dir", tmp_path / "out")
    start(monkeypatch, "flux", *arguments)
    [image] = (tmp_path / "out").glob("*.jpg")
    assert read_metadata(image)["true_cfg"] == 3.5


def test_each_step_is_two_passes(twin):
    settings = resolve(
        GenerateSettings(prompts=["a dog"], model=NAME, width=64, height=64, num_steps=2, device="cpu")
    )
    pipe = LoadedModel.load(settings)
    rows = []
    with pipe.listening(rows.append):
        list(generate_all(pipe, settings))
    assert sum(rows) == 4
    opened, dtype = find_model(settings), torch.float32
    plain = settings.model_copy(update={"true_cfg": 1.0})
    estimates = [
        MemoryEstimator(s, opened.spec, opened.sources(), dtype, dtype, False) for s in (settings, plain)
    ]
    assert [estimate.passes for estimate in estimates] == [2, 1]
    assert load_flow_model(NAME, "cpu").params == pipe.model.params


def test_the_hints_name_it(twin, tmp_path):
    with pytest.raises(InputError, match=r"load it as flux-nano-schnell; or .* flux-dev-de-distilled$"):
        find_model(ModelSettings(model="flux-nano", weights=str(twin))).check()
    schnell = ModelSettings(model="flux-nano-schnell", weights=str(twin))
    assert find_model(schnell).check() is None, "nothing in the file tells it from schnell"


@pytest.mark.parametrize(
    ("model", "name", "other"),
    [
        ("flux-schnell", "flux-dev-de-distill/consolidated.safetensors", NAME),
        ("flux-schnell", "fluxDevUndistilled.safetensors", NAME),
        (NAME, "flux1-schnell.safetensors", "flux-schnell"),
    ],
)
def test_a_name_that_says_the_other_model(twin, tmp_path, monkeypatch, model, name, other):
    monkeypatch.setitem(configs, "flux-schnell", replace(configs[NAME], shifted=False))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(twin.read_bytes())
    with pytest.warns(InputWarning, match=f"but its name says {other}: if so, give model {other}"):
        find_model(ModelSettings(model=model, weights=str(path))).check()
