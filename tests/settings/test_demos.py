"""Settings as the user writes them: defaults, numbers of prompts, and run.json read back."""

import json
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as some

from flux.settings.demos import (
    DinoSettings,
    GenerateSettings,
    LayerSettings,
    Prompt,
    ScanSettings,
    SkipSettings,
)
from flux.settings.doses import DEFAULT_DOSE, DOSES, Dose, DoseName
from flux.settings.edits import EditSettings, Turn
from flux.settings.files import CONFIGS, check_settings, read_settings

CLASSES = (GenerateSettings, LayerSettings, SkipSettings, DinoSettings, EditSettings, ScanSettings)
EDIT = {"prompt": "a dog", "edits": ["a cat"]}
DINO = {"input_dir": "output/skip"}


def test_import_is_light():
    heavy = "{'torch', 'numpy', 'PIL', 'transformers'}"
    code = f"import sys, flux.settings; print(*{heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_every_field_is_described():
    for cls in (*CLASSES, Prompt, Turn):
        for name, field in cls.model_fields.items():
            assert field.description, name
            assert "\n" not in field.description, name


def test_defaults_and_numbers(read):
    settings = read(EditSettings, EDIT | {"guidance": 3, "num_steps": 4})
    assert (settings.guidance, type(settings.guidance)) == (3.0, float)
    assert (settings.model, settings.width, settings.vital_layers) == ("flux-nano", None, "auto")
    assert settings.edits == ("a cat",)


def test_settings_are_frozen(read):
    with pytest.raises(ValueError, match="frozen"):
        read(EditSettings, EDIT).seed = 3


def test_prompts_get_seeds(read):
    """A plain text, or an object without a seed, counts on from `seed` by its place in the list."""
    prompts = ["a", {"prompt": "b", "seed": 99}, {"prompt": "c"}, "d"]
    settings = read(GenerateSettings, {"seed": 5, "prompts": prompts})
    assert [(each.prompt, each.seed) for each in settings.prompts] == [
        ("a", 5),
        ("b", 99),
        ("c", 7),
        ("d", 8),
    ]


def test_prompt_of_demo_1(read):
    settings = read(LayerSettings, {"prompt": "a", "seed": 3})
    assert settings.prompts == (Prompt(prompt="a", seed=3),)
    assert settings == read(LayerSettings, {"prompts": ["a"], "seed": 3})


@pytest.mark.parametrize("layers", ["all", [3], [0, 56], [[0, 1], [1, 2]]])
def test_layers_are_all_a_list_or_sets(read, layers):
    settings = read(SkipSettings, {"prompts": ["a"], "layers": layers})
    assert json.loads(json.dumps(settings.layers)) == layers


@pytest.mark.parametrize("layers", ["auto", "output/skip/vital_layers.json", [0, 1, 18]])
def test_vital_layers_are_a_name_a_file_or_a_list(read, layers):
    settings = read(EditSettings, EDIT | {"vital_layers": layers})
    assert json.loads(json.dumps(settings.vital_layers)) == layers


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (GenerateSettings, {"prompts": ["a", "ä 猫"], "seed": 2**63 - 2, "guidance": 0.1}),
        (LayerSettings, {"prompt": "a", "seed": 3}),
        (SkipSettings, {"prompts": ["a"], "layers": [[0, 1], [2]]}),
        (DinoSettings, DINO | {"threshold": 0.1}),
        (EditSettings, EDIT | {"vital_layers": [1, 2], "photo": "cat.png", "inject_until": 0.4}),
        (
            EditSettings,
            EDIT | {"weight": {"1": 0.5}, "edits": ["a", {"prompt": "b", "dose": "add", "then": ["c"]}]},
        ),
    ],
)
def test_run_json_gives_the_same_settings(read, cls, data):
    settings = read(cls, data)
    run = {"demo": cls.demo, "settings": settings.to_json(), "timings": {"load": 1.5}}
    assert read(cls, run) == settings
    assert read(cls, settings.model_dump()) == settings


@pytest.mark.parametrize(
    ("given", "read_as"),
    [(True, "model"), (False, "none"), ("auto", "auto"), ("blocks", "blocks"), ("True", "model")],
)
def test_offload_was_once_true_or_false(tmp_path, given, read_as):
    """In older run.json files it still is, and on the command line, where --offload alone means True."""
    (tmp_path / "run.json").write_text(json.dumps({"demo": "edit", "settings": EDIT | {"offload": given}}))
    settings = read_settings(EditSettings, tmp_path / "run.json")
    assert settings.offload == read_as
    assert settings.to_json()["offload"] == read_as
    assert read_settings(EditSettings, tmp_path / "run.json", {"offload": True}).offload == "model"


# ---- doses


def test_every_dose_can_be_named():
    assert set(get_args(DoseName)) == set(DOSES)


def test_a_turn_without_a_dose_has_the_default_one():
    assert Turn(prompt="a cat").effective_dose() == DOSES[DEFAULT_DOSE]


def test_own_numbers_replace_those_of_the_dose():
    turn = Turn(prompt="a cat", dose="balanced", weight=0.5, top=3)
    assert turn.effective_dose() == Dose(weight=0.5, inject_until=0.5, falling=True, top=3)


def test_an_own_end_of_the_window_holds_for_all_areas():
    assert Turn(prompt="a cat", dose="auto", inject_until=0.3).effective_dose().hold_subject_until is None


# ---- any settings

texts = some.text(some.characters(codec="utf-8"), min_size=1).filter(str.strip)
paths = texts.filter(lambda text: not set(text) & set("\0\b\f\n\r\t"))
fractions = some.floats(0, 1, allow_nan=False)
layers = some.lists(some.integers(0, 56), min_size=1, max_size=5, unique=True)
models = some.fixed_dictionaries(
    {},
    optional={
        "model": texts,
        "device": texts,
        "lora": some.lists(paths | some.fixed_dictionaries({"file": paths, "weight": fractions}), max_size=2),
        "width": some.integers(16, 4096),
        "num_steps": some.integers(1, 99),
        "guidance": some.floats(0, 99),
        "negative_prompt": some.text(some.characters(codec="utf-8")),
        "watermark": some.booleans(),
        "offload": some.sampled_from(["none", "model", "blocks", "auto"]),
    },
)
doses = some.fixed_dictionaries(
    {},
    optional={
        "dose": some.sampled_from(sorted(DOSES)),
        "weight": fractions | some.dictionaries(some.integers(0, 56).map(str), fractions, max_size=3),
        "top": some.integers(1, 57),
        "falling": some.booleans(),
        "mask": paths,
    },
)
turns = texts | some.tuples(some.fixed_dictionaries({"prompt": texts}), doses).map(
    lambda both: both[0] | both[1]
)


def back_from_json(settings):
    return check_settings(type(settings), json.loads(json.dumps(settings.to_json())))


@given(models, some.lists(texts, min_size=1, max_size=3), some.integers(0, 2**62))
def test_any_generate_settings_come_back_from_json(model, prompts, seed):
    settings = check_settings(GenerateSettings, {**model, "prompts": prompts, "seed": seed})
    assert back_from_json(settings) == settings


@given(models, texts, layers | some.lists(layers, min_size=1, max_size=1) | some.just("all"))
def test_any_skip_settings_come_back_from_json(model, prompt, skipped):
    settings = check_settings(SkipSettings, {**model, "prompts": [prompt], "layers": skipped})
    assert back_from_json(settings) == settings


@given(models, doses, texts, some.lists(turns, min_size=1, max_size=3), layers | paths)
def test_any_edit_settings_come_back_from_json(model, dose, prompt, edits, vital):
    settings = check_settings(
        EditSettings, {**model, **dose, "prompt": prompt, "edits": edits, "vital_layers": vital}
    )
    assert back_from_json(settings) == settings
