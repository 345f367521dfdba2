"""Each wrong entry ends as one line that names what is wrong."""

from itertools import product

import pytest
from helpers.settings_files import message_of

from flux.errors import InputError
from flux.evaluate.settings import EvaluateSettings
from flux.settings.demos import DinoSettings, GenerateSettings, LayerSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.files import READ_BY_DEMOS, check_settings

EDIT = {"prompt": "a dog", "edits": ["a cat"]}
DINO = {"input_dir": "output/skip"}


WRONG = [
    (EditSettings, EDIT | {"edits": ["a", "b", 5]}, "file.json: edits[2]: expected a string, got 5"),
    (EditSettings, EDIT | {"edits": ["a", " "]}, 'edits[1]: expected some text, got " "'),
    (EditSettings, EDIT | {"edits": []}, "edits: expected at least one entry, got []"),
    (EditSettings, EDIT | {"edits": "a cat"}, 'edits: expected a list, got "a cat"'),
    (EditSettings, {"prompt": "a dog"}, "missing field 'edits': list of prompts, one for each edited image"),
    (EditSettings, EDIT | {"prompt": None}, "missing field 'prompt': what the reference shows"),
    (EditSettings, EDIT | {"editz": []}, "unknown field 'editz', did you mean 'edits'?"),
    (EditSettings, {"prompt": "a", "edit": []}, "unknown field 'edit', did you mean 'edits'?"),
    (EditSettings, EDIT | {"edits": [5]}, "edits[0]: expected a string, got 5"),
    (EditSettings, EDIT | {"edits": ["  "]}, 'edits[0]: expected some text, got "  "'),
    (
        EditSettings,
        EDIT | {"edits": [{"promt": "b"}]},
        "edits[0]: unknown field 'promt', did you mean 'prompt'?",
    ),
    (
        EditSettings,
        EDIT | {"photo": "C:\new.png"},
        r'photo: expected a path (for each \ in it, write / or \\), got "C:\n',
    ),
    (EditSettings, EDIT | {"photo": "a\0.png"}, "photo: expected a path (for each "),
    (EditSettings, EDIT | {"two\nlines": 1}, "unknown field 'two\\nlines', known are model, "),
    (EditSettings, EDIT | {"width": 0}, "width: expected at least 16, got 0"),
    (EditSettings, EDIT | {"width": "512"}, 'width: expected an integer, got "512"'),
    (EditSettings, EDIT | {"width": 512.5}, "width: expected an integer, got 512.5"),
    (EditSettings, EDIT | {"height": True}, "height: expected an integer, got true"),
    (EditSettings, EDIT | {"num_steps": 0}, "num_steps: expected at least 1, got 0"),
    (EditSettings, EDIT | {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    (EditSettings, EDIT | {"guidance": "3.5"}, 'guidance: expected a number, got "3.5"'),
    (EditSettings, EDIT | {"guidance": True}, "guidance: expected a number, got true"),
    (EditSettings, EDIT | {"guidance": float("nan")}, "guidance: expected a finite number, got NaN"),
    (EditSettings, EDIT | {"guidance": float("inf")}, "guidance: expected a finite number, got Infinity"),
    (EditSettings, EDIT | {"guidance": 10**400}, "guidance: expected a number, got 1000"),
    (EditSettings, EDIT | {"true_cfg": 0.5}, "true_cfg: expected at least 1, got 0.5"),
    (EditSettings, EDIT | {"nudging": 0}, "nudging: expected more than 0, got 0"),
    (EditSettings, EDIT | {"offload": 1}, "offload: expected 'none', 'model', 'blocks' or 'auto', got 1"),
    (
        EditSettings,
        EDIT | {"dtype": "fp8"},
        "dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', got \"fp8\"",
    ),
    (EditSettings, EDIT | {"output_dir": ""}, 'output_dir: expected some text, got ""'),
    (EditSettings, EDIT | {"seed": -1}, "seed: expected at least 0, got -1"),
    (
        EditSettings,
        EDIT | {"seed": 2**63},
        "seed: expected at most 9223372036854775807, got 9223372036854775808",
    ),
    (
        EditSettings,
        EDIT | {"inject_from": 0.5, "inject_until": 0.5},
        "file.json: got inject_from 0.5 and inject_un",
    ),
    (EditSettings, EDIT | {"weight": 1.5}, "weight: expected at most 1.0, got 1.5"),
    (EditSettings, EDIT | {"weight": {"3": -1}}, "weight.3: expected at least 0, got -1"),
    (EditSettings, EDIT | {"weight": {"x": 1}}, 'weight.x: expected an integer, got "x"'),
    (EditSettings, EDIT | {"dose": "strong"}, "dose: expected 'auto', "),
    (
        EditSettings,
        EDIT | {"edits": [{"weight": 1}]},
        "edits[0]: missing field 'prompt': what the edited image",
    ),
    (
        EditSettings,
        EDIT | {"edits": [{"prompt": "a", "then": [{"prompt": "b", "top": 0}]}]},
        "edits[0].then[0].top: expected at least 1, got 0",
    ),
    (EditSettings, EDIT | {"edits": [{"prompt": "a", "wieght": 1}]}, "edits[0]: unknown field 'wieght', did"),
    (
        EditSettings,
        EDIT | {"edits": [{"prompt": "a", "then": [{"prompt": "b", "then": ["c"]}]}]},
        "edits[0].then[0]: unknown field 'then', known are dose",
    ),
    (EditSettings, {"edits": ["a"], "photo": "a.png"}, "a caption_model can write it"),
    (EditSettings, EDIT | {"inject_until": 1.5}, "inject_until: expected at most 1.0, got 1.5"),
    (EditSettings, EDIT | {"inject_from": -0.1}, "inject_from: expected at least 0, got -0.1"),
    (EditSettings, EDIT | {"vital_layers": []}, "vital_layers: expected at least one entry, got []"),
    (EditSettings, EDIT | {"vital_layers": [1, "2"]}, 'vital_layers[1]: expected an integer, got "2"'),
    (EditSettings, EDIT | {"vital_layers": [1, -2]}, "vital_layers[1]: expected at least 0, got -2"),
    (EditSettings, EDIT | {"vital_layers": [1, 1]}, "vital_layers: expected each only once, got [1, 1]"),
    (
        EditSettings,
        EDIT | {"vital_layers": [[1]]},
        'vital_layers: expected "auto", a list of layers, a vital_layers.j',
    ),
    (
        GenerateSettings,
        {"prompts": ["a"], "outpaint": 50},
        "outpaint: expected fractions of the image's sides, from 0 to 10, got 50",
    ),
    (
        SkipSettings,
        {"prompts": ["a"], "layers": "some"},
        'layers: expected "all", a list of layers, or a list of lists of layers, got "some"',
    ),
    (
        SkipSettings,
        {"prompts": ["a"], "layers": 5},
        'layers: expected "all", a list of layers, or a list of lists',
    ),
    (SkipSettings, {"prompts": ["a"], "layers": []}, "layers: expected at least one entry, got []"),
    (SkipSettings, {"prompts": ["a"], "layers": [[1], []]}, "layers[1]: expected at least one entry, got []"),
    (SkipSettings, {"prompts": ["a"], "layers": [[1], 2]}, "layers[1]: expected a list, got 2"),
    (
        SkipSettings,
        {"prompts": ["a"], "layers": [[1, 2, 2]]},
        "layers[0]: expected each only once, got [1, 2, 2]",
    ),
    (
        SkipSettings,
        {"prompts": ["a"], "layers": [[1, 2], [2, 1]]},
        "layers: expected each only once, got [[1, 2], ",
    ),
    (SkipSettings, {"prompts": ["a"], "layers": [[1, True]]}, "layers[0][1]: expected an integer, got true"),
    (
        SkipSettings,
        {"prompts": ["a", {"prompt": "b", "seed": 2**63 - 2}], "seeds": 3},
        "got seeds 3, which lead to seed 9223372036854775808, expected at most 9223372036854775807",
    ),
    (GenerateSettings, {}, "missing field 'prompts': list of prompts"),
    (GenerateSettings, {"promts": ["a"]}, "unknown field 'promts', did you mean 'prompts'?"),
    (GenerateSettings, {"prompts": []}, "prompts: expected at least one entry, got []"),
    (
        GenerateSettings,
        {"prompts": ["a", 5]},
        'prompts[1]: expected a string or {"prompt": "...", "seed": 0}, got 5',
    ),
    (
        GenerateSettings,
        {"prompts": ["a"], "lora": [5]},
        'lora[0]: expected a string or {"file": "...", "weight": 0.8}, got 5',
    ),
    (GenerateSettings, {"prompts": [{"prompt": 5}]}, "prompts[0].prompt: expected a string, got 5"),
    (
        GenerateSettings,
        {"prompts": [{"seed": 5}]},
        "prompts[0]: missing field 'prompt': what the image shows",
    ),
    (
        GenerateSettings,
        {"prompts": [{"prompt": "a", "sed": 1}]},
        "prompts[0]: unknown field 'sed', did you mean 'seed'?",
    ),
    (
        GenerateSettings,
        {"prompts": [{"prompt": "a", "seed": -1}]},
        "prompts[0].seed: expected at least 0, got -1",
    ),
    (
        GenerateSettings,
        {"prompts": ["a", "b"], "seed": 2**63 - 1},
        "prompts[1]: expected at most 9223372036854775807",
    ),
    (GenerateSettings, {"prompts": ["a"], "seed": "x"}, 'seed: expected an integer, got "x"'),
    (
        GenerateSettings,
        {"prompts": ["\ud800"]},
        r'prompts[0]: expected text that UTF-8 can hold, got "\ud800"',
    ),
    (
        GenerateSettings,
        {"prompts": "none.json"},
        'file.json: prompts: no file "none.json", looked in the current folder',
    ),
    (GenerateSettings, {"prompts": "a dog " * 99}, 'a prompt itself is written as a list: ["..."]'),
    (LayerSettings, {}, "expected exactly one of prompt, prompts, got none of them"),
    (
        LayerSettings,
        {"prompt": "a", "prompts": ["b"]},
        "expected exactly one of prompt, prompts, got prompt and prompts",
    ),
    (LayerSettings, {"prompt": 5}, "file.json: prompt: expected a string, got 5"),
    (DinoSettings, DINO, "expected exactly one of top, threshold, gap, got none of them"),
    (
        DinoSettings,
        DINO | {"top": 3, "threshold": 0.1},
        "expected exactly one of top, threshold, gap, got top and threshold",
    ),
    (DinoSettings, DINO | {"top": 0}, "top: expected at least 1, got 0"),
    (DinoSettings, {"top": 3}, "missing field 'input_dir': folder that demo 2 wrote"),
    (EditSettings, ["a"], 'file.json: expected an object {...} at the top, got ["a"]'),
    (EditSettings, {"demo": "edit", "settings": 3}, "file.json: settings: expected an object {...}, got 3"),
    (
        EditSettings,
        {"demo": "skip", "settings": {}},
        'got a run of demo "skip", expected one of "edit", run demo_2_',
    ),
    (EditSettings, {"demo": "x", "settings": {}}, 'file.json: got a run of demo "x", expected one of "edit"'),
    (
        EditSettings,
        {"prompts": ["a"], "strength": 0.5},
        "file.json: got a file for demo_0_test.py, expected one for demo_4_edit.py",
    ),
    (
        DinoSettings,
        {"prompts": "a.json", "layers": [[1]]},
        "file.json: got a file for demo_2_skip.py, expected one for demo_3_dino.py",
    ),
    (
        SkipSettings,
        {"prompts": ["a"], "stop_when": "never", "gap": True},
        "got a file for python -m flux.scan, expected one for demo_2_skip.py",
    ),
    (
        EditSettings,
        {"model": "flux-nano", "rule": {}, "vitality": {}, "vital_layers": [1]},
        "got a file of vital layers, which demo_4_edit.py takes as vital_layers, expected one for demo_4",
    ),
    (EditSettings, {"demo": ["skip"], "settings": {}}, 'file.json: got a run of demo ["skip"]'),
]


@pytest.mark.parametrize(("cls", "data", "part"), WRONG, ids=[part[:60] for _, _, part in WRONG])
def test_wrong_settings_are_told_in_one_line(read, cls, data, part):
    message = message_of(read, cls, data)
    assert message.startswith("file.json: ")
    assert part in message


def test_each_problem_has_a_line(read):
    """Problems are counted, not the branches of a union that were tried."""
    data = {"prompt": "a", "edits": ["b", 5, " "], "height": -64, "widht": 64}
    with pytest.raises(InputError) as error:
        read(EditSettings, data)
    assert str(error.value).splitlines() == [
        "file.json: unknown field 'widht', did you mean 'width'?",
        "file.json: height: expected at least 16, got -64",
        "file.json: edits[1]: expected a string, got 5",
        'file.json: edits[2]: expected some text, got " "',
    ]


def test_long_lists_of_problems_are_cut(read):
    with pytest.raises(InputError) as error:
        read(EditSettings, EDIT | {"edits": list(range(30))})
    lines = str(error.value).splitlines()
    assert lines[8:] == ["file.json: edits[8]: expected a string, got 8", "21 more problems like these"]


JUNK = [
    *(None, [], {}, "x", "", 1.5, True, -1, 10**30, float("nan"), {"a": 1}, {"1": "x"}, {"1": None}),
    *([each] for each in ([], {}, None, "x", 1, True, 1.5)),
]


@pytest.mark.parametrize("cls", [*READ_BY_DEMOS, EvaluateSettings])
def test_whatever_a_field_says_the_message_is_ours(cls):
    """No traceback, and none of pydantic's own words."""
    lines = [line for name, junk in product(cls.model_fields, JUNK) for line in lines_of(cls, {name: junk})]
    assert lines
    assert [line for line in lines if "Input should" in line] == []


def lines_of(cls, data: dict) -> list[str]:
    """Return the lines that wrong settings end with."""
    try:
        check_settings(cls, data)
    except InputError as error:
        return str(error).splitlines()
    return []
