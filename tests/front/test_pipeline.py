"""The front door for Python: one call each, with the model's own defaults, and one line for wrong values."""

import doctest
import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers.images import noise
from helpers.settings_files import message_of
from PIL import Image

import flux
from flux.front import Pipeline, pipeline
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, ScanSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.files import CONFIGS
from flux.specs import configs

DOG, CAT = "a dog on the grass", "a cat on the grass"
SMALL = {"width": 64, "height": 64, "num_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def pipe(nano):
    return Pipeline(nano, ModelSettings(device="cpu", dtype="float32"))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


# ---- where it is


def test_importing_the_package_loads_nothing():
    heavy = "{'torch', 'numpy', 'PIL', 'pydantic'}"
    code = f"import sys, flux; print({heavy} & set(sys.modules), 'Pipeline' in dir(flux))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (result.stdout.strip(), result.stderr) == ("set() True", "")


def test_the_package_has_the_door_and_no_other_names():
    assert flux.Pipeline is Pipeline
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = flux.Pipelin


# ---- what help() says


@pytest.mark.usefixtures("loads_once")
@pytest.mark.parametrize("name", ["", "load", "generate", "edit", "skip", "scan", "watch"])
def test_examples_in_docstrings(name, monkeypatch):
    """Each runs by itself, as in `help(flux.Pipeline)`; where no steps are given, the model's own are few."""
    size = 256 if name in ("generate", "skip") else 64  # these two say how large their images are
    monkeypatch.setitem(configs, "flux-nano", replace(configs["flux-nano"], num_steps=2, size=size))
    member = getattr(Pipeline, name) if name else Pipeline
    [test] = doctest.DocTestFinder(recurse=False).find(member, name or "Pipeline", globs={})
    assert test.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    assert runner.run(test, out=said.append).failed == 0, "".join(said)


FIELDS = {
    "load": ModelSettings,
    "generate": GenerateSettings,
    "edit": EditSettings,
    "skip": SkipSettings,
    "scan": ScanSettings,
    "watch": LayerSettings,
}
OWN_NAMES = {"self", "cls", "progress", "fields", "prompt", "prompts", "folder"}


@pytest.mark.parametrize(("name", "cls"), FIELDS.items(), ids=FIELDS)
def test_arguments_are_fields_with_their_defaults(name, cls):
    """No argument is invented, and none has another default than the settings'."""
    for argument in inspect.signature(getattr(Pipeline, name)).parameters.values():
        if argument.name not in OWN_NAMES:
            default = cls.model_fields[argument.name].default
            assert argument.default in (None, default, inspect.Parameter.empty), argument.name
            assert f"{argument.name}: " in inspect.getdoc(getattr(Pipeline, name)), argument.name


# ---- defaults


def test_what_is_not_given_is_the_models_own(pipe, monkeypatch):
    monkeypatch.setattr(pipeline, "generate_all", lambda *_: [noise()])
    made = pipe.generate(DOG)
    assert [(entry.prompt, entry.seed) for entry in made.settings.prompts] == [(DOG, 0)]
    s = made.settings
    assert (s.width, s.height, s.num_steps, s.guidance, s.true_cfg) == (256, 256, 20, 3.5, 1.0)
    four_steps = Pipeline(pipe.models, ModelSettings(model="flux-nano-schnell"))
    assert four_steps.generate(DOG).settings.num_steps == 4


def test_a_scan_without_prompts_takes_the_packages_own(pipe, monkeypatch):
    monkeypatch.setattr(pipeline, "scan", lambda settings, *_, **__: [settings])
    result = pipe.scan()
    assert (len(result.settings.prompts), result.settings.stop_when, result.settings.gap) == (
        64,
        "stable",
        True,
    )
    assert result.settings.prompts[0].prompt == DOG
    assert pipe.scan(DOG, top=3).settings.gap is None


def test_more_fields_reach_the_settings(pipe):
    made = pipe.generate([DOG, {"prompt": CAT, "seed": 9}], seed=4, batch_size=2, negative_prompt="", **SMALL)
    assert [entry.seed for entry in made.settings.prompts] == [4, 9]
    assert len(made) == len(list(made)) == 2
    assert made.settings.batch_size == 2


# ---- the same as the functions below


def test_an_image_is_that_of_the_loaded_model(pipe):
    [expected] = pipe.models.generate(DOG, 7, width=64, height=64, num_steps=2, guidance=3.5, progress=False)
    assert np.array_equal(pixels(pipe.generate(DOG, seed=7, **SMALL)[0]), pixels(expected))


def test_an_edit_of_a_photograph_in_every_form(pipe, tmp_path):
    photo = noise(96, 64)
    photo.save(tmp_path / "photo.png")
    sparse = {"dose": "paper", "seed": 3, "num_steps": 2, "progress": False, "width": 96, "height": 64}
    forms = [photo, pixels(photo), tmp_path / "photo.png", str(tmp_path / "photo.png")]
    first, *others = [pipe.edit(DOG, CAT, photo=form, **sparse) for form in forms]
    assert first.inputs.keys() == {"photo"}
    assert others[-1].inputs == {}
    assert all(np.array_equal(pixels(first.edits[0]), pixels(other.edits[0])) for other in others)


def test_a_photograph_keeps_its_shape(pipe, monkeypatch):
    monkeypatch.setattr(pipeline, "edit", lambda *_, **__: type("Made", (), {"reference": None, "edits": []}))
    settings = pipe.edit(DOG, CAT, photo=noise(200, 100)).settings
    assert settings.width == 2 * settings.height + 16 * (settings.width // 16 % 2)
    assert abs(settings.width * settings.height / 256**2 - 1) < 0.1


def test_a_mask_in_every_form(pipe, tmp_path):
    white = np.zeros((64, 64), dtype=bool)
    white[:, 32:] = True
    Image.fromarray(white).save(tmp_path / "mask.png")
    how = {"seed": 3, "dose": "paper", **SMALL}
    forms = [white, Image.fromarray(white), tmp_path / "mask.png"]
    edits = [pixels(pipe.edit(DOG, CAT, mask=form, **how).edits[0]) for form in forms]
    assert all(np.array_equal(edits[0], other) for other in edits[1:])
    assert not np.array_equal(edits[0], pixels(pipe.edit(DOG, CAT, mask="none", **how).edits[0]))


def test_image_to_image(pipe):
    made = pipe.generate(DOG, image=pixels(noise()), strength=0.5, **SMALL)
    assert not np.array_equal(pixels(made[0]), pixels(pipe.generate(DOG, **SMALL)[0]))
    assert made.settings.image == "image.png"


def test_numbers_and_paths_of_other_libraries(pipe, tmp_path):
    made = pipe.generate(DOG, **SMALL | {"width": np.int64(64), "guidance": np.float32(2)})
    assert (made.settings.width, made.settings.guidance) == (64, 2.0)
    skipped = pipe.skip(DOG, np.array([4, 9]), folder=tmp_path / "skip", **SMALL)
    assert skipped.layer_sets == [(4,), (9,)]


def test_an_object_is_a_list_of_one(pipe):
    made = pipe.generate({"prompt": DOG, "seed": 9}, **SMALL)
    assert [entry.seed for entry in made.settings.prompts] == [9]
    assert pipe.edit(DOG, {"prompt": CAT, "dose": "add"}, **SMALL).prompts == [CAT]


def test_paths_in_the_home_folder(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    noise().save(tmp_path / "photo.png")
    made = pipe.generate(DOG, image="~/photo.png", **SMALL)
    assert made.save("~/images") == tmp_path / "images"
    assert pipe.skip(DOG, 4, folder="~/skip", **SMALL).image(4).size == (64, 64)


def test_fields_of_load_are_the_defaults_of_calls():
    loaded = Pipeline.load("flux-nano", num_steps=2, width=64, height=64)
    made = loaded.generate(DOG, progress=False).settings
    assert (made.num_steps, made.width, made.height) == (2, 64, 64)


# ---- one line


def test_repr_is_short(pipe):
    assert repr(pipe) == "<Pipeline flux-nano, cpu, float32>"
    assert repr(pipe.models) == "<LoadedModel flux-nano, cpu, float32>"
    quantised = Pipeline(pipe.models, ModelSettings(quantize="8bit"))
    assert repr(quantised) == "<Pipeline flux-nano, cpu, float32, quantize='8bit'>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.generate(DOG, num_steps=0), "num_steps: expected at least 1, got 0"),
        (lambda pipe: pipe.generate(DOG, num_step=3), "unknown field 'num_step', did you mean 'num_steps'?"),
        (lambda pipe: pipe.generate([]), "prompts: expected at least one entry, got []"),
        (lambda pipe: pipe.generate(DOG, image=3), "Got int, expected a path, a PIL image or a NumPy array"),
        (lambda pipe: pipe.edit(DOG, CAT, dose="much"), "dose: expected "),
        (lambda pipe: pipe.edit(DOG, CAT, vital_layers=[15]), "Got layers [15]"),
        (lambda pipe: pipe.edit(None, CAT), "missing field 'prompt'"),
        (lambda pipe: pipe.edit(DOG, CAT, photo=np.zeros((9, 9, 3))), "Got an array of type float64"),
        (lambda pipe: pipe.skip(DOG, 15), "Got layers [15]"),
        (lambda pipe: pipe.scan(DOG, top=1, threshold=0.1), "expected exactly one of top, threshold, gap"),
        (lambda pipe: pipe.watch(DOG, 4, words="cat"), "cat"),
        (lambda _: Pipeline.load("flux-nan"), "Got unknown model 'flux-nan', did you mean 'flux-nano'?"),
        (lambda _: Pipeline.load(quantize="3bit"), "quantize: expected 'none', '8bit', '4bit' or 'fp8'"),
        (lambda _: Pipeline.load(lora="/nowhere.safetensors"), "Got /nowhere.safetensors"),
    ],
)
def test_wrong_values_end_in_one_line(pipe, monkeypatch, call, message):
    monkeypatch.setattr(pipeline.LoadedModel, "denoising", lambda _: pytest.fail("something was computed"))
    assert message in message_of(call, pipe)


def test_settings_without_effect_are_told(pipe, capsys):
    pipe.generate(DOG, negative_prompt="a cat", **SMALL)
    assert "without effect: negative_prompt (true_cfg is 1)" in capsys.readouterr().err
