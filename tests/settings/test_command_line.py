"""The command line: values by the type of their fields, help, and the programs that use it."""

import json
import os
import subprocess
import sys
from functools import cache, wraps
from pathlib import Path
from typing import Annotated

import pytest
from helpers.settings_files import SettingsFolder, message_of
from hypothesis import given
from hypothesis import strategies as some

import demo_gr
from flux.settings.command_line import fields_of, help_text, parse, type_name
from flux.settings.command_line import run as run_command
from flux.settings.demos import DinoSettings, GenerateSettings, LayerSettings, Prompt, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.fields import LIST, Words
from flux.settings.files import check_settings

ROOT = Path(__file__).parents[2]
EDIT = {"prompt": "a dog", "edits": ["a cat"]}
DINO = {"input_dir": "output/skip"}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads `data`, with the values of a command line over it."""
    folder = SettingsFolder(tmp_path, monkeypatch)
    return lambda cls, data, *arguments: folder(cls, data, **parse(cls.model_fields, arguments))


# ---- values


@pytest.mark.parametrize(
    ("cls", "data", "arguments", "expected"),
    [
        (EditSettings, EDIT, ["--num-steps", "3", "--inject_until=1"], {"num_steps": 3, "inject_until": 1.0}),
        (EditSettings, EDIT, ["--prompt", "7", "--device", "0"], {"prompt": "7", "device": "0"}),
        (EditSettings, EDIT, ["--negative_prompt", "blurry, ugly"], {"negative_prompt": "blurry, ugly"}),
        (EditSettings, EDIT, ["--negative_prompt", "-ugly"], {"negative_prompt": "-ugly"}),
        (EditSettings, EDIT, ["--prompt=--a"], {"prompt": "--a"}),
        (EditSettings, EDIT, ["--prompt="], {"prompt": ""}),
        (EditSettings, EDIT | {"photo": "a.png"}, ["--photo", ""], {"photo": None}),
        (EditSettings, EDIT | {"top": 3}, ["--top", "null"], {"top": None}),
        (EditSettings, EDIT, ["--edits", "a pig"], {"edits": ("a pig",)}),
        (EditSettings, EDIT, ["--edits", "red,blue"], {"edits": ("red", "blue")}),
        (EditSettings, EDIT, ["--edits", "a red, blue dog"], {"edits": ("a red, blue dog",)}),
        (EditSettings, EDIT, ["--edits", '["a pig", "7"]'], {"edits": ("a pig", "7")}),
        (EditSettings, EDIT, ["--vital_layers", "5"], {"vital_layers": (5,)}),
        (EditSettings, EDIT, ["--vital_layers", "[5, 6]"], {"vital_layers": (5, 6)}),
        (EditSettings, EDIT, ["--vital_layers", "5,6"], {"vital_layers": (5, 6)}),
        (EditSettings, EDIT, ["--vital_layers", "paper"], {"vital_layers": "paper"}),
        (EditSettings, EDIT, ["--weight", ".5"], {"weight": 0.5}),
        (EditSettings, EDIT, ["--weight", '{"3": 0.5}'], {"weight": {3: 0.5}}),
        (SkipSettings, {"prompts": ["a"]}, ["--layers", "5"], {"layers": (5,)}),
        (SkipSettings, {"prompts": ["a"], "layers": [1]}, ["--layers", "all"], {"layers": "all"}),
        (SkipSettings, {"prompts": ["a"]}, ["--layers", "[[0, 1], [2]]"], {"layers": ((0, 1), (2,))}),
        (DinoSettings, DINO | {"top": 5}, ["--threshold", "0.5"], {"top": None, "threshold": 0.5}),
        (DinoSettings, DINO | {"top": 5}, ["--gap", "true"], {"top": None, "gap": True}),
        (DinoSettings, DINO | {"top": 5}, ["--gap"], {"top": None, "gap": True}),
        (DinoSettings, DINO | {"top": 5}, ["--metrics", "dino,psnr"], {"metrics": ("dino", "psnr")}),
        (EditSettings, EDIT, ["--falling", "true", "--tiled", "false"], {"falling": True, "tiled": False}),
        (EditSettings, EDIT, ["--falling", "--tiled", "--offload"], {"falling": True, "offload": "model"}),
        (EditSettings, EDIT, ["--offload", "blocks"], {"offload": "blocks"}),
        (LayerSettings, {"prompt": "a"}, ["--prompts", '["b"]'], {"prompts": (Prompt(prompt="b", seed=0),)}),
        (LayerSettings, {"prompt": "a", "words": ["a"]}, ["--words", ""], {"words": ()}),
        (GenerateSettings, {"prompts": ["a"]}, ["--prompts", '{"prompt": "b"}'],
         {"prompts": (Prompt(prompt="b", seed=0),)}),
    ],
)  # fmt: skip
def test_values_are_read_by_the_type_of_their_field(read, cls, data, arguments, expected):
    settings = read(cls, data, *arguments)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_a_lora_by_its_name(read):
    [lora] = read(EditSettings, EDIT, "--lora", "a b.safetensors").lora
    assert (lora.file, lora.weight) == ("a b.safetensors", 1.0)


def test_the_file_may_stand_anywhere():
    fields = fields_of(program) | dict(EditSettings.model_fields)
    expected = {"file": "my.json", "tiled": True, "seed": 3}
    for arguments in (["my.json", "--tiled", "--seed", "3"], ["--tiled", "my.json", "--seed=3"]):
        assert parse(fields, arguments, "file") == expected


@pytest.mark.parametrize(
    "text", ["007", "1e3", "None", "null", "true", "[a]", "{}", "a,b", " a ", "1.0", "-5"]
)
@pytest.mark.parametrize("field", ["prompt", "photo"], ids=["a text", "a text or none"])
def test_texts_stay_as_typed(field, text):
    assert parse(EditSettings.model_fields, [f"--{field}", text]) == {field: text}


texts = some.text(some.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(texts)
def test_any_text_survives(text):
    given = parse(EditSettings.model_fields, [f"--prompt={text}", "--edits", json.dumps([text])])
    settings = check_settings(EditSettings, given)
    assert (settings.prompt, settings.edits) == (text, (text,))


@given(some.integers(0, 2**62), some.floats(0, 1), some.booleans())
def test_any_number_survives(seed, until, tiled):
    arguments = ["--seed", str(seed), "--cfg_from", repr(until), "--tiled", str(tiled)]
    assert parse(EditSettings.model_fields, arguments) == {"seed": seed, "cfg_from": until, "tiled": tiled}


# ---- what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-stepz", "3"], "command line: unknown field 'num_stepz', did you mean 'num_steps'?"),
        (["--width", "big"], 'command line: width: expected an integer, got "big"'),
        (["--width", "1e3"], "command line: width: expected an integer, got 1000.0"),
        (["--edits", '["a", 7]'], "command line: edits[1]: expected a string, got 7"),
        (["--seed"], "command line: seed: expected a value after --seed"),
        (["--prompt", "--tiled"], "command line: prompt: expected a value after --prompt"),
        (["a.json"], 'command line: got "a.json" without the name of a field before it'),
        (["--tiled", "yes"], 'command line: tiled: expected true or false, got "yes"'),
        (["--weight", "much"], 'command line: weight: expected a number, got "much"'),
        (
            ["--edits", "a cat", "--edits", "an owl"],
            """command line: got --edits twice: give one list, such as '["a", "b"]'""",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_in_one_line(read, arguments, message):
    assert message_of(read, EditSettings, EDIT, *arguments) == message


def test_a_broken_list(read):
    message = message_of(read, EditSettings, EDIT, "--edits", "['a']")
    assert message.startswith('command line: edits: expected JSON such as ["a", "b"], got "[\'a\']": ')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "big"], 'size: expected an integer, got "big"'),
        (["--size", "1.5"], "size: expected an integer, got 1.5"),
        (["--fast=maybe"], 'fast: expected true or false, got "maybe"'),
        (["--caps", "[1, true]"], "caps[1]: expected a number, got true"),
        ([], "missing field 'folder': where to write"),
    ],
)
def test_a_functions_own_parameters_are_checked(capsys, arguments, message):
    """A program without settings gets values of the types that it names."""
    given = [] if "missing" in message else ["--folder", "007"]
    with pytest.raises(SystemExit) as end:
        run_command(bench, "Measures.", arguments=[*given, *arguments])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: command line: {message}\n"


def test_values_of_a_functions_own_parameters():
    got = []

    @wraps(bench)
    def noted(*args, **kwargs) -> None:
        got.append(bench(*args, **kwargs))

    arguments = ["--folder", "007", "--caps", "24,16", "--words", "fp8,none"]
    run_command(noted, "Measures.", arguments=arguments)
    assert got == [("007", None, False, (24, 16), ("fp8", "none"))]


def bench(
    folder: str,
    size: int | None = None,
    fast: bool = False,
    caps: Annotated[tuple[float, ...], LIST] = (1,),
    words: Words = (),
) -> tuple:
    """A benchmark.

    Args:
        folder: where to write
    """
    return folder, size, fast, caps, words


# ---- help


def program(file: str = "my.json", size: int | None = None, **more: int) -> None:
    """A program.

    Args:
        file: the first
            two lines
        size: in pixels: width and height
        more: others

    Raises:
        InputError: never
    """


def test_fields_of_a_function():
    fields = fields_of(program)
    assert list(fields) == ["file", "size"]
    assert (fields["file"].description, fields["file"].default) == ("the first two lines", "my.json")
    assert (fields["size"].description, fields["size"].default) == ("in pixels: width and height", None)


def test_help_of_a_function():
    lines = help_text(fields_of(program), "Does it.", "file").splitlines()
    assert lines == [
        "Does it.",
        "",
        "Options:",
        "  FILE text",
        '      the first two lines (default: "my.json")',
        "  --size integer",
        "      in pixels: width and height (default: not set)",
    ]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("seed", "integer"),
        ("guidance", "number"),
        ("tiled", "true|false"),
        ("edits", "list"),
        ("vital_layers", "text or list"),
        ("weight", "number or object"),
        ("parts", "kv|k|v|q|qk|qv|qkv"),
    ],
)
def test_help_names_the_type_of_a_field(field, name):
    assert type_name(EditSettings.model_fields[field].annotation) == name


PROGRAMS = {
    "demo_0_test.py": "strength",
    "demo_1_layer.py": "at_steps",
    "demo_2_skip.py": "ray_address",
    "demo_3_dino.py": "threshold",
    "demo_4_edit.py": "vital_layers",
    "demo_gr.py": "content_filter",
    "-m flux": "text_encoders",
    "-m flux.scan": "stop_when",
    "-m flux.evaluate": "benchmark",
}


@cache
def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    script = name.split() if name.startswith("-m") else [str(ROOT / name)]
    command = [sys.executable, "-X", "importtime", *script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_there_at_once(name):
    """It names the fields, and nothing heavy is imported for it."""
    done = run(name, "--help")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "pydantic" in imported
    assert not imported & {"torch", "numpy", "PIL", "transformers", "gradio"}
    assert f"--{PROGRAMS[name]} " in done.stdout


def test_help_describes_every_field():
    words = " ".join(run("demo_4_edit.py", "--help").stdout.split())
    for name, field in EditSettings.model_fields.items():
        assert f"--{name} {type_name(field.annotation)} {field.description} (" in words


@pytest.mark.parametrize("name", ["demo_4_edit.py", "demo_gr.py", "-m flux"])
def test_programs_end_on_an_unknown_option(name):
    done = run(name, "--devise", "cpu")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert errors == ["error: command line: unknown field 'devise', did you mean 'device'?"]


def test_the_studio_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo_gr, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        demo_gr.main(name="no model")
    assert end.value.code == 2
    message = 'error: The studio needs gradio, which is not installed: pip install -e ".[gradio]"\n'
    assert capsys.readouterr().err == message
