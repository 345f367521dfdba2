"""Each wrong entry ends as one line that names what is wrong; each shipped file of settings can be read."""

import json
import subprocess
import sys

import pytest

from flux.errors import InputError
from flux.settings import files as module
from flux.settings.demos import (
    DinoSettings,
    EditSettings,
    GenerateSettings,
    LayerSettings,
    Prompt,
    SkipSettings,
)
from flux.settings.files import CONFIGS, check_settings, read_settings

CLASSES = {
    cls.demo: cls for cls in (GenerateSettings, LayerSettings, SkipSettings, DinoSettings, EditSettings)
}
EDIT = {"prompt": "a dog", "edits": ["a cat"]}
DINO = {"input_dir": "output/skip"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes `data` to file.json in an empty current folder, and reads it with `overrides` over it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs").mkdir()

    def write_and_read(cls, data, **overrides):
        (tmp_path / "file.json").write_text(json.dumps(data))
        return read_settings(cls, "file.json", overrides)

    return write_and_read


def message_of(function, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# ---- what ships


@pytest.mark.parametrize("folder", ["", "flux-dev"])
@pytest.mark.parametrize("demo", CLASSES)
def test_shipped_configs(folder, demo):
    file = f"{folder}/{demo}.json".lstrip("/")
    settings = read_settings(CLASSES[demo], file)
    assert settings.model == (folder or "flux-nano")
    assert (
        json.loads((CONFIGS / file).read_text()).get("output_dir", settings.output_dir) == settings.output_dir
    )


def test_demo_3_reads_what_demo_2_writes():
    for folder in ("", "flux-dev/"):
        skip = read_settings(SkipSettings, f"{folder}skip.json")
        assert read_settings(DinoSettings, f"{folder}dino.json").input_dir == skip.output_dir


@pytest.mark.parametrize(("file", "count"), [("prompts.json", 64), ("prompts_nano.json", 64)])
def test_shipped_prompts_are_distinct(file, count):
    prompts = read_settings(GenerateSettings, "test.json", {"prompts": file}).prompts
    assert len({each.prompt for each in prompts}) == len({each.seed for each in prompts}) == count


def test_import_is_light():
    code = "import sys, flux.settings.demos; print(*{'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (result.stdout.strip(), result.stderr) == ("", "")


def test_every_field_is_described():
    for cls in (*CLASSES.values(), Prompt):
        for name, field in cls.model_fields.items():
            assert field.description and "\n" not in field.description, name


# ---- what is read


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


@pytest.mark.parametrize("folder", ["", "deep", "configs"])
def test_prompts_file(read, tmp_path, folder):
    """Found as given, beside the file that names it, or in configs/."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "test.json").write_text('{"prompts": "list.json"}')
    (tmp_path / folder / "list.json").write_text('["a", "b"]')
    assert read_settings(GenerateSettings, "deep/test.json").prompts == (
        Prompt(prompt="a", seed=0),
        Prompt(prompt="b", seed=1),
    )


def test_prompt_of_demo_1(read):
    settings = read(LayerSettings, {"prompt": "a", "seed": 3})
    assert settings.prompts == (Prompt(prompt="a", seed=3),)
    assert settings == read(LayerSettings, {"prompts": ["a"], "seed": 3})


@pytest.mark.parametrize("layers", ["all", [3], [0, 56], [[0, 1], [1, 2]]])
def test_layers(read, layers):
    settings = read(SkipSettings, {"prompts": ["a"], "layers": layers})
    assert json.loads(json.dumps(settings.layers)) == layers


@pytest.mark.parametrize("layers", ["auto", "output/skip/vital_layers.json", [0, 1, 18]])
def test_vital_layers(read, layers):
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


def test_file_with_byte_order_mark(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(EDIT), encoding="utf-8-sig")
    assert read_settings(EditSettings, tmp_path / "file.json").prompt == "a dog"


def test_check_settings():
    """Fields that stand in no file: the line names a place only if one is given."""
    assert check_settings(EditSettings, {**EDIT, "seed": 3}).seed == 3
    data = {**EDIT, "edits": ("a", 7)}
    assert message_of(check_settings, EditSettings, data) == "edits[1]: expected a string, got 7"
    places = {"edits": "the page"}
    assert message_of(check_settings, EditSettings, data, "x", places).startswith("the page: edits[1]: ")


# ---- the command line


@pytest.mark.parametrize(
    ("cls", "data", "overrides", "expected"),
    [
        (EditSettings, EDIT, {"num-steps": 3, "inject_until": 1}, {"num_steps": 3, "inject_until": 1.0}),
        (EditSettings, EDIT, {"prompt": 7, "device": 0}, {"prompt": "7", "device": "0"}),
        (EditSettings, EDIT, {"negative_prompt": ("blurry", "ugly")}, {"negative_prompt": "blurry, ugly"}),
        (EditSettings, EDIT | {"photo": "a.png"}, {"photo": None}, {"photo": None}),
        (EditSettings, EDIT, {"edits": "a pig"}, {"edits": ("a pig",)}),
        (EditSettings, EDIT, {"vital_layers": 5}, {"vital_layers": (5,)}),
        (EditSettings, EDIT, {"vital_layers": (5, 6)}, {"vital_layers": (5, 6)}),
        (EditSettings, EDIT, {"vital_layers": "paper"}, {"vital_layers": "paper"}),
        (SkipSettings, {"prompts": ["a"]}, {"layers": 5}, {"layers": (5,)}),
        (SkipSettings, {"prompts": ["a"], "layers": [1]}, {"layers": "all"}, {"layers": "all"}),
        (SkipSettings, {"prompts": ["a"]}, {"layers": ((0, 1), (2,))}, {"layers": ((0, 1), (2,))}),
        (DinoSettings, DINO | {"top": 5}, {"threshold": 0.5}, {"top": None, "threshold": 0.5}),
        (DinoSettings, DINO | {"top": 5}, {"gap": "true"}, {"top": None, "gap": True}),
        (EditSettings, EDIT, {"falling": "true", "tiled": "false"}, {"falling": True, "tiled": False}),
        (LayerSettings, {"prompt": "a"}, {"prompts": ["b"]}, {"prompts": (Prompt(prompt="b", seed=0),)}),
        (LayerSettings, {"prompts": ["a", "b"]}, {"prompt": "c"}, {"prompts": (Prompt(prompt="c", seed=0),)}),
        (
            GenerateSettings,
            {"prompts": ["a"]},
            {"prompts": {"prompt": "b"}},
            {"prompts": (Prompt(prompt="b", seed=0),)},
        ),
        # seeds given by the user replace those in the file
        (
            GenerateSettings,
            {"prompts": [{"prompt": "a", "seed": 70}, "b"]},
            {"seed": 4},
            {"prompts": (Prompt(prompt="a", seed=4), Prompt(prompt="b", seed=5))},
        ),
    ],
)
def test_overrides(read, cls, data, overrides, expected):
    settings = read(cls, data, **overrides)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num-stepz": 3}, "command line: unknown field 'num_stepz', did you mean 'num_steps'?"),
        ({"width": "big"}, 'command line: width: expected an integer, got "big"'),
        ({"edits": ("a", 7)}, "command line: edits[1]: expected a string, got 7"),
        ({"width": "big", "height": 8}, 'command line: width: expected an integer, got "big" (and 1 more)'),
    ],
)
def test_wrong_overrides(read, overrides, message):
    assert message_of(read, EditSettings, EDIT, **overrides) == message


# ---- what is wrong

WRONG = [
    (EditSettings, EDIT | {"edits": ["a", "b", 5]}, "file.json: edits[2]: expected a string, got 5"),
    (EditSettings, EDIT | {"edits": ["a", " "]}, 'edits[1]: expected some text, got " "'),
    (EditSettings, EDIT | {"edits": []}, "edits: expected at least one entry, got []"),
    (EditSettings, EDIT | {"edits": "a cat"}, 'edits: expected a list, got "a cat"'),
    (EditSettings, {"prompt": "a dog"}, "missing field 'edits': list of prompts, one for each edited image"),
    (EditSettings, EDIT | {"prompt": None}, "missing field 'prompt': what the reference shows"),
    (EditSettings, EDIT | {"editz": []}, "unknown field 'editz', did you mean 'edits'?"),
    (EditSettings, {"prompt": "a", "edit": []}, "unknown field 'edit', did you mean 'edits'? (and 1 more)"),
    (EditSettings, EDIT | {"two\nlines": 1}, "unknown field 'two\\nlines', known are model, "),
    (EditSettings, EDIT | {"width": 0}, "width: expected at least 16, got 0"),
    (EditSettings, EDIT | {"width": "512"}, 'width: expected an integer, got "512"'),
    (EditSettings, EDIT | {"width": 512.5}, "width: expected an integer, got 512.5"),
    (EditSettings, EDIT | {"height": True}, "height: expected an integer, got true"),
    (EditSettings, EDIT | {"height": -64, "width": -64}, "width: expected at least 16, got -64 (and 1 more)"),
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
    (SkipSettings, {"prompts": ["a"], "layers": "some"}, "layers: expected 'all', got \"some\""),
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
    (GenerateSettings, {}, "missing field 'prompts': list of prompts"),
    (GenerateSettings, {"promts": ["a"]}, "unknown field 'promts', did you mean 'prompts'?"),
    (GenerateSettings, {"prompts": []}, "prompts: expected at least one entry, got []"),
    (
        GenerateSettings,
        {"prompts": ["a", 5]},
        'prompts[1]: expected a string or {"prompt": "...", "seed": 0}, got 5',
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
]


@pytest.mark.parametrize(("cls", "data", "part"), WRONG, ids=[part[:60] for _, _, part in WRONG])
def test_wrong_settings(read, cls, data, part):
    message = message_of(read, cls, data)
    assert message.startswith("file.json: ")
    assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1,\n "b" 2}', "file.json: broken JSON at line 2, column 6"),
        (b"", "file.json: broken JSON at line 1, column 1"),
        (b'{"prompt": "\xff"}', "file.json: not UTF-8 text (from byte 12 on)"),
        (b'{"seed": 1, "seed": 2}', "file.json: field 'seed' stands twice in one object"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "file.json: Exceeds the limit"),
        (b"[" * 100_000, "file.json: maximum recursion depth exceeded"),
    ],
)
def test_unreadable_files(tmp_path, monkeypatch, content, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_bytes(content)
    assert part in message_of(read_settings, EditSettings, "file.json")


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_of(read_settings, EditSettings, "edits.json")
    assert message == f'no file "edits.json", looked in the current folder, {CONFIGS}'


def test_folder(tmp_path):
    assert "expected a JSON file, got the folder" in message_of(read_settings, EditSettings, tmp_path)


def test_wrong_prompts_file(read, tmp_path):
    """What is wrong in a list of prompts is reported under that file's name."""
    (tmp_path / "list.json").write_text('["a", {"prompt": "b", "seed": "c"}]')
    data = {"prompts": "list.json"}
    assert (
        message_of(read, GenerateSettings, data) == 'list.json: prompts[1].seed: expected an integer, got "c"'
    )
    (tmp_path / "list.json").write_text('{"prompts": ["a"]}')
    assert message_of(read, GenerateSettings, data).startswith(
        "list.json: expected a list of prompts [...], got {"
    )


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
