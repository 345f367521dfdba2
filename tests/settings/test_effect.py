"""Warnings about settings that change nothing, and about sizes that the model was not made for."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.settings_files import SettingsFolder

from flux.errors import InputError
from flux.settings.complete import MOST_PIXELS, check_run, resolve
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, ScanSettings, SessionSettings
from flux.settings.edits import EditSettings
from flux.settings.effect import fields_without_effect, settings_warnings
from flux.settings.files import check_settings
from flux.specs import get_spec

ROOT = Path(__file__).parents[2]
EDIT = {"prompt": "a dog", "edits": ["a cat"]}
GENERATE = {"prompts": ["a dog"]}
LAYER = {"prompt": "a dog"}
SCAN = {"prompts": ["a dog"], "top": 3}
SCHNELL = {"model": "flux-nano-schnell"}
KONTEXT = {"model": "flux-dev-kontext"}

CASES = [
    (GenerateSettings, GENERATE | {"negative_prompt": "x"}, ["negative_prompt (true_cfg is 1)"]),
    (
        GenerateSettings,
        GENERATE | {"negative_prompt": "x", "true_cfg": 1},
        ["negative_prompt (true_cfg is 1)"],
    ),
    (GenerateSettings, GENERATE | {"negative_prompt": "x", "true_cfg": 2}, []),
    (GenerateSettings, GENERATE | SCHNELL | {"guidance": 1}, ["guidance (flux-nano-schnell takes none)"]),
    (GenerateSettings, GENERATE | {"guidance": 1}, []),
    (
        GenerateSettings,
        GENERATE | {"lora_scale": 0.5, "lora_weights": "a"},
        ["lora_weights, lora_scale (flux-nano has no LoRA of its own)"],
    ),
    (GenerateSettings, GENERATE | SCHNELL | {"lora_scale": 0.5}, []),
    (
        GenerateSettings,
        GENERATE | {"reference_strength": 2.0, "overlap": 0.1, "paste_back": False, "siglip": "a"},
        [
            "reference_strength (no context)",
            "paste_back (no fill)",
            "overlap (no outpaint)",
            "siglip (no redux)",
        ],
    ),
    (
        GenerateSettings,
        GENERATE | KONTEXT | {"context": "a", "context_positions": "offset"},
        ["context_positions (not several context images)"],
    ),
    (GenerateSettings, GENERATE | KONTEXT | {"context": ["a", "b"], "context_positions": "offset"}, []),
    (
        EditSettings,
        EDIT | {"model": "flux-dev-fill", "fill": "a", "mask": "b", "overlap": 0.1},
        ["overlap (no outpaint)"],
    ),
    (
        SessionSettings,
        {"aspect_ratio": "2:1", "width": 64, "height": 64},
        ["aspect_ratio (width and height are given)"],
    ),
    (
        SessionSettings,
        {"model": "flux-dev-fill", "fill": "a", "mask": "b", "aspect_ratio": "2:1"},
        ["aspect_ratio (fill has a shape of its own)"],
    ),
    (SessionSettings, {"aspect_ratio": "2:1"}, []),
    (GenerateSettings, GENERATE | {"strength": 0.5}, ["strength (no image)"]),
    (GenerateSettings, GENERATE | {"strength": 0.5, "image": "a.png"}, []),
    (GenerateSettings, GENERATE | {"strength": 1, "image": "a.png"}, ["image (strength is 1)"]),
    (SessionSettings, {"strength": 0.5}, ["strength (no init_image)"]),
    (SessionSettings, {"strength": 0.5, "init_image": "a.png"}, []),
    (LayerSettings, LAYER | {"at_steps": [1], "words": ["dog"]}, ["at_steps, words (no layers)"]),
    (LayerSettings, LAYER | {"at_steps": [1], "words": ["dog"], "layers": [1]}, []),
    (ScanSettings, SCAN | {"top": 9, "layers": [1, 2]}, ["top 9 (only 2 layers are skipped alone)"]),
    (ScanSettings, SCAN | {"top": 2, "layers": [[1, 2], [3]]}, ["top 2 (only 1 layers are skipped alone)"]),
    (ScanSettings, SCAN | {"top": 16}, ["top 16 (only 15 layers are skipped alone)"]),
    (ScanSettings, SCAN | {"top": 2, "layers": [1, 2]}, []),
    (EditSettings, EDIT | {"paste_back": True, "inversion": "none"}, ["paste_back, inversion (no photo)"]),
    (EditSettings, EDIT | {"as_published": True, "nudging": 1.1}, ["as_published, nudging (no photo)"]),
    (
        EditSettings,
        EDIT | {"correct_drift": False, "caption_model": "x"},
        ["correct_drift, caption_model (no photo)"],
    ),
    (EditSettings, EDIT | {"paste_back": True, "nudging": 1.1, "photo": "a.png", "inversion": "euler"}, []),
    (
        EditSettings,
        EDIT | {"photo": "a.png", "nudging": 1.1, "correct_drift": False},
        ['nudging, correct_drift (inversion is "noising")'],
    ),
    (
        EditSettings,
        EDIT | {"photo": "a.png", "inversion": "directedit", "correct_drift": False},
        ['correct_drift (inversion is "directedit")'],
    ),
    (
        EditSettings,
        EDIT | {"photo": "a.png", "inversion": "none", "vital_layers": [3], "dose": "paper", "weight": 0.5},
        ['dose, weight (inversion "none" injects nothing)'],
    ),
    (
        EditSettings,
        EDIT | {"photo": "a.png", "inversion": "none", "nudging": 1.1},
        ['nudging (inversion is "none")'],
    ),
    (
        EditSettings,
        EDIT | {"photo": "a.png", "inversion": "fireflow", "as_published": True},
        ["inversion (as_published uses euler)"],
    ),
    (EditSettings, EDIT | SCHNELL | {"photo": "a.png", "as_published": True}, []),
    (EditSettings, EDIT | {"cfg_from": 0.5, "mimic_scale": 3}, ["cfg_from, mimic_scale (true_cfg is 1)"]),
    (EditSettings, EDIT | {"true_cfg": 2, "mimic_percentile": 0.9}, ["mimic_percentile (no mimic_scale)"]),
    (EditSettings, EDIT | {"true_cfg": 2, "cfg_from": 0.5, "mimic_scale": 3, "mimic_percentile": 0.9}, []),
    (EditSettings, EDIT | {"vital_layers": [4, 0], "top": 9}, ["top 9 (only 2 vital layers)"]),
    (
        EditSettings,
        EDIT | {"vital_layers": [4, 0], "edits": [{"prompt": "a", "top": 3}]},
        ["top 3 (only 2 vital layers)"],
    ),
    (EditSettings, EDIT | {"vital_layers": [4, 0], "top": 2}, []),
    (LayerSettings, LAYER | {"batch_size": 2}, ["batch_size (images are made one by one)"]),
    (EditSettings, EDIT | {"true_cfg": 2, "cfg_from": 1}, ["true_cfg (cfg_from is 1)"]),
    (EditSettings, EDIT | {"photo": "a.png", "caption_model": "m"}, ["caption_model (there is a prompt)"]),
    (
        EditSettings,
        EDIT | SCHNELL | {"edits": [{"prompt": "a", "guidance": 9}]},
        ["guidance (flux-nano-schnell takes none)"],
    ),
]


@pytest.mark.parametrize(("cls", "fields", "expected"), CASES)
def test_fields_without_effect(cls, fields, expected):
    settings = check_settings(cls, fields)
    spec = get_spec(settings.model)
    assert fields_without_effect(settings, spec) == expected
    if cls is not SessionSettings:
        assert fields_without_effect(resolve(settings), spec) == expected


@pytest.mark.parametrize("model", ["flux-nano", "flux-nano-schnell", "flux-dev", "flux-schnell"])
@pytest.mark.parametrize(
    ("cls", "fields"),
    [(GenerateSettings, GENERATE), (LayerSettings, LAYER), (ScanSettings, SCAN), (EditSettings, EDIT)],
    ids=["generate", "layer", "scan", "edit"],
)
def test_defaults_need_no_warning(cls, fields, model):
    """Nor does the run.json of such a run, which names every field."""
    settings = resolve(check_settings(cls, fields | {"model": model}))
    assert not settings_warnings(settings, get_spec(model))
    assert not settings_warnings(check_settings(cls, settings.to_json()), get_spec(model))


def test_an_edit_with_the_prompt_of_its_reference_is_told_once():
    """Not refused, since an edit of a photograph may be a test of how well it comes back."""
    settings = check_settings(EditSettings, EDIT | {"edits": ["a cat", "a dog", "a dog"]})
    [line] = settings_warnings(settings, get_spec(settings.model))
    assert line == "\"a dog\" is the reference's prompt and an edit's, which asks for no change"


@pytest.mark.parametrize(
    ("model", "width", "height", "warned"),
    [
        ("flux-nano", 512, 512, True),
        ("flux-nano", 64, 64, True),
        ("flux-nano", 256, 384, False),
        ("flux-nano", 128, 128, False),
        ("flux-dev", 512, 512, False),
        ("flux-dev", 1536, 1024, False),
        ("flux-dev", 2048, 2048, True),
        ("flux-dev", 256, 256, True),
    ],
)
def test_sizes_far_from_the_models_own_are_told(model, width, height, warned):
    settings = ModelSettings(model=model, width=width, height=height)
    lines = settings_warnings(settings, get_spec(model))
    assert [line.partition(" is far from ")[0] for line in lines] == [f"{width}x{height}"] * warned


def test_each_reason_is_a_line_on_stderr(capsys, tmp_path):
    fields = {"negative_prompt": "x", "strength": 0.5, "output_dir": str(tmp_path / "out")}
    check_run(resolve(check_settings(GenerateSettings, GENERATE | fields)))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "warning: without effect: negative_prompt (true_cfg is 1)",
        "warning: without effect: strength (no image)",
    ]


def test_a_folder_that_cannot_be_written_to_is_found_first(tmp_path, monkeypatch):
    folder = SettingsFolder(tmp_path, monkeypatch)
    (tmp_path / "taken").touch()
    settings = resolve(folder(GenerateSettings, GENERATE | {"output_dir": "taken/out"}))
    with pytest.raises(InputError, match="taken is a file"):
        check_run(settings)


def test_a_run_holds_its_folder(tmp_path):
    """Another process is refused while this one lives."""
    folder = tmp_path / "out"
    check_run(resolve(check_settings(GenerateSettings, GENERATE | {"output_dir": str(folder)})))
    script = "import sys; from flux.files import claim_folder; claim_folder(sys.argv[1])"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1].endswith(
        f"Cannot write to {folder} (another run is writing to it): wait for it or name another folder"
    )


@pytest.mark.parametrize("side", [9472, 30_000, 100_000])
def test_sizes_beyond_all_image_files(side):
    with pytest.raises(InputError, match=f"Got {side}x{side}, expected at most 89 million pixels"):
        resolve(ModelSettings(width=side, height=side))
    assert resolve(ModelSettings(width=9456, height=9456)).width ** 2 <= MOST_PIXELS
