"""Files of settings: how they are found and read, and what overrides do."""

import json
import os

import pytest
from helpers.settings_files import message_of

from flux.errors import InputError
from flux.settings.demos import DinoSettings, GenerateSettings, LayerSettings, Prompt, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.files import CONFIGS, check_settings, read_settings

CLASSES = {
    cls.demo: cls for cls in (GenerateSettings, LayerSettings, SkipSettings, DinoSettings, EditSettings)
}
EDIT = {"prompt": "a dog", "edits": ["a cat"]}
DINO = {"input_dir": "output/skip"}


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


# ---- what is read


@pytest.mark.parametrize("folder", ["", "deep", "configs"])
def test_prompts_may_stand_in_a_file_of_their_own(read, tmp_path, folder):
    """Found as given, beside the file that names it, or in configs/."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "test.json").write_text('{"prompts": "list.json"}')
    (tmp_path / folder / "list.json").write_text('["a", "b"]')
    assert read_settings(GenerateSettings, "deep/test.json").prompts == (
        Prompt(prompt="a", seed=0),
        Prompt(prompt="b", seed=1),
    )


def test_file_with_byte_order_mark(tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(EDIT), encoding="utf-8-sig")
    assert read_settings(EditSettings, tmp_path / "file.json").prompt == "a dog"


def test_settings_of_no_file_are_checked_too():
    """Fields that stand in no file: the line names a place only if one is given."""
    assert check_settings(EditSettings, {**EDIT, "seed": 3}).seed == 3
    data = {**EDIT, "edits": ("a", 7)}
    assert message_of(check_settings, EditSettings, data) == "edits[1]: expected a string, got 7"
    places = {"edits": "the page"}
    assert message_of(check_settings, EditSettings, data, "x", places).startswith("the page: edits[1]: ")


# ---- overrides


FOR_NANO = {**EDIT, "model": "flux-nano", "num_steps": 20, "width": 256, "vital_layers": [4, 0], "seed": 3}


def test_a_model_named_in_place_of_the_files_brings_its_own_numbers(read, capsys):
    settings = read(EditSettings, FOR_NANO, model="flux-nano-schnell", guidance=2.0)
    numbers = settings.width, settings.num_steps, settings.vital_layers, settings.guidance, settings.seed
    assert numbers == (None, None, "auto", 2.0, 3)
    assert capsys.readouterr().err == (
        "file.json is for flux-nano: flux-nano-schnell brings its own in place of "
        "width 256, num_steps 20, vital_layers [4, 0]\n"
    )


@pytest.mark.parametrize(
    ("data", "overrides", "steps"),
    [
        (FOR_NANO, {"model": "flux-nano"}, 20),
        (FOR_NANO, {"num_steps": 5}, 5),
        ({**EDIT, "num_steps": 20}, {"model": "flux-nano"}, 20),
        ({**EDIT, "num_steps": 9}, {"model": "flux-dev", "num_steps": 9}, 9),
        ({**EDIT, "vital_layers": "stable-flow"}, {"model": "flux-dev"}, None),
    ],
    ids=["the file's own", "no model named", "the default", "given with it", "nothing to leave out"],
)
def test_nothing_is_said_where_the_files_numbers_hold(read, capsys, data, overrides, steps):
    settings = read(EditSettings, data, **overrides)
    assert settings.num_steps == steps
    assert settings.vital_layers == (
        tuple(v) if isinstance(v := data.get("vital_layers", "auto"), list) else v
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cls", "data", "overrides", "expected"),
    [
        (EditSettings, EDIT, {"num_steps": 3, "inject_until": 1}, {"num_steps": 3, "inject_until": 1.0}),
        (EditSettings, EDIT | {"photo": "a.png"}, {"photo": None}, {"photo": None}),
        (EditSettings, EDIT, {"vital_layers": (5, 6)}, {"vital_layers": (5, 6)}),
        (SkipSettings, {"prompts": ["a"], "layers": [1]}, {"layers": "all"}, {"layers": "all"}),
        (SkipSettings, {"prompts": ["a"]}, {"layers": ((0, 1), (2,))}, {"layers": ((0, 1), (2,))}),
        (DinoSettings, DINO | {"top": 5}, {"threshold": 0.5}, {"top": None, "threshold": 0.5}),
        (
            GenerateSettings,
            {"prompts": ["a"], "fill": "a.png", "mask": "b.png"},
            {"outpaint": [0.5]},
            {"mask": None, "outpaint": (0.5, 0.5, 0.5, 0.5)},
        ),
        (DinoSettings, DINO | {"top": 5}, {"gap": True}, {"top": None, "gap": True}),
        (LayerSettings, {"prompt": "a"}, {"prompts": ["b"]}, {"prompts": (Prompt(prompt="b", seed=0),)}),
        (LayerSettings, {"prompts": ["a", "b"]}, {"prompt": "c"}, {"prompts": (Prompt(prompt="c", seed=0),)}),
        # seeds given by the user replace those in the file
        (
            GenerateSettings,
            {"prompts": [{"prompt": "a", "seed": 70}, "b"]},
            {"seed": 4},
            {"prompts": (Prompt(prompt="a", seed=4), Prompt(prompt="b", seed=5))},
        ),
    ],
)
def test_overrides_go_before_the_file(read, cls, data, overrides, expected):
    settings = read(cls, data, **overrides)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_stepz": 3}, "command line: unknown field 'num_stepz', did you mean 'num_steps'?"),
        ({"width": "big"}, 'command line: width: expected an integer, got "big"'),
        ({"edits": ("a", 7)}, "command line: edits[1]: expected a string, got 7"),
    ],
)
def test_wrong_overrides_are_told(read, overrides, message):
    assert message_of(read, EditSettings, EDIT, **overrides) == message


def test_a_run_from_before_there_was_a_field(tmp_path):
    """It repeats what was done then; a file of settings means the present default."""
    for data, expected in (
        ({"settings": EDIT}, False),
        ({"settings": EDIT | {"sparse": True}}, True),
        (EDIT, True),
    ):
        (tmp_path / "run.json").write_text(json.dumps(data))
        assert read_settings(EditSettings, tmp_path / "run.json").sparse == expected


def test_files_beside_the_json_file(tmp_path):
    """Images, weights and LoRAs are looked for there first; other texts and lost files stay as they are."""
    for name in ("a.png", "b.safetensors", "c.safetensors"):
        (tmp_path / name).touch()
    lora = ["b.safetensors", {"file": "c.safetensors", "weight": 0.5}, "lost.safetensors"]
    (tmp_path / "run.json").write_text(json.dumps(EDIT | {"photo": "a.png", "lora": lora, "model": "a.png"}))
    settings = read_settings(EditSettings, tmp_path / "run.json")
    assert (settings.photo, settings.model) == (str(tmp_path / "a.png"), "a.png")
    assert [(each.file, each.weight) for each in settings.lora] == [
        (str(tmp_path / "b.safetensors"), 1.0),
        (str(tmp_path / "c.safetensors"), 0.5),
        ("lost.safetensors", 1.0),
    ]
    given = {"photo": "a.png", "lora": ["b.safetensors"]}
    settings = read_settings(EditSettings, tmp_path / "run.json", given)
    assert (settings.photo, settings.lora[0].file) == ("a.png", "b.safetensors")


class Renamed(EditSettings, frozen=True):
    """Settings one of whose fields had another name."""

    renamed = {"sampling_steps": "num_steps"}  # noqa: RUF012  # declared as a ClassVar by the base


def test_a_renamed_field_is_still_read(read, capsys):
    assert read(Renamed, EDIT | {"sampling_steps": 7}).num_steps == 7
    assert capsys.readouterr().err == "file.json: field 'sampling_steps' is now called 'num_steps'\n"


def test_problems_are_reported_where_they_are(read):
    with pytest.raises(InputError) as error:
        read(EditSettings, EDIT | {"width": 1}, seed="x")
    assert str(error.value).splitlines() == [
        "file.json: width: expected at least 16, got 1",
        'command line: seed: expected an integer, got "x"',
    ]


# ---- paths


@pytest.mark.parametrize(
    "field", ["weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "output_dir", "photo",
              "mask", "vital_layers", "caption_model"],
)  # fmt: skip
def test_home_in_a_path(read, tmp_path, monkeypatch, field):
    """It is the home folder in a file and on the command line. run.json holds the path itself."""
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = os.path.join(str(tmp_path), "a b")
    assert getattr(read(EditSettings, EDIT | {field: "~/a b"}), field) == expected
    assert read(EditSettings, EDIT, **{field: "~/a b"}).to_json()[field] == expected
    assert getattr(read(EditSettings, EDIT | {field: "a~b"}), field) == "a~b"


def test_home_in_other_paths(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.json").write_text('["a"]')
    settings = read(GenerateSettings, {"prompts": "~/list.json", "lora": "~/x"})
    assert (settings.lora[0].file, settings.prompts[0].prompt) == (str(tmp_path / "x"), "a")
    assert read_settings(GenerateSettings, "~/file.json").prompts == settings.prompts
    assert read(DinoSettings, DINO | {"top": 1, "input_dir": "~/x"}).input_dir == str(tmp_path / "x")


# ---- files that cannot be read


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1,\n "b" 2}', "file.json: broken JSON at line 2, column 6"),
        (b"", "file.json: broken JSON at line 1, column 1"),
        (
            rb'{"photo": "C:\models"}',
            r"file.json: broken JSON at line 1, column 14: for each \ in a text, write / or \\",
        ),
        (b'{"prompt": "\xff"}', "file.json: not UTF-8 text (from byte 12 on)"),
        (b'{"seed": 1, "seed": 2}', "file.json: field 'seed' stands twice in one object"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "file.json: Exceeds the limit"),
        (b"[" * 100_000, "file.json: maximum recursion depth exceeded"),
    ],
)
def test_unreadable_files_are_told(tmp_path, monkeypatch, content, part):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.json").write_bytes(content)
    assert part in message_of(read_settings, EditSettings, "file.json")


def test_a_missing_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = message_of(read_settings, EditSettings, "edits.json")
    assert message == f'no file "edits.json", looked in the current folder, {CONFIGS}'


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    assert "expected a JSON file, got the folder" in message_of(read_settings, EditSettings, tmp_path)


def test_wrong_prompts_file(read, tmp_path):
    """A mistake in a list of prompts is reported under that file's name."""
    (tmp_path / "list.json").write_text('["a", {"prompt": "b", "seed": "c"}]')
    data = {"prompts": "list.json"}
    assert (
        message_of(read, GenerateSettings, data) == 'list.json: prompts[1].seed: expected an integer, got "c"'
    )
    (tmp_path / "list.json").write_text('{"prompts": ["a"]}')
    assert message_of(read, GenerateSettings, data).startswith(
        "list.json: expected a list of prompts [...], got {"
    )
