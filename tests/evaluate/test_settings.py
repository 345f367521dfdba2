"""The fields of an evaluation's file."""

import json

import pytest
from helpers.evaluation import settings_of

from flux.errors import InputError
from flux.evaluate.settings import EvaluateSettings, methods_of
from flux.runs.record import run_record
from flux.settings.complete import resolve
from flux.settings.demos import DinoSettings, GenerateSettings, LayerSettings, SkipSettings
from flux.settings.edits import EditSettings
from flux.settings.files import CONFIGS, check_settings, read_settings


@pytest.mark.parametrize(
    "file",
    [
        *("evaluate", "evaluate_inversions", "evaluate_strength", "evaluate_generated", "evaluate_kontext"),
        *("evaluate_context", "flux-dev/evaluate"),
    ],
)
def test_shipped_files_are_sound(file):
    settings = read_settings(EvaluateSettings, f"{file}.json")
    for method in methods_of(settings):
        assert resolve(method.settings).num_steps
    assert check_settings(EvaluateSettings, settings.to_json()) == settings


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([{"dose": "paper"}], 'each to have a "name"'),
        ([{"name": "!"}], 'with letters or digits, got {"name": "!"}'),
        (["x"], r"methods\[0\]: expected an object {...}, got \"x\""),
        ([{"name": "a b"}, {"name": "A-b"}], "got 'A-b' twice, or a name like it"),
        ([{"name": "truth"}], "got 'truth', the name of a row"),
        ([{"name": "x", "then": ["a"]}], r"methods\[0\]: unknown field 'then', known are name, strength"),
        (
            [{"name": "x", "inverson": "euler"}],
            r"methods\[0\]: unknown field 'inverson', did you mean 'inversion'",
        ),
        ([{"name": "x"}, {"name": "y", "weight": 2.0}], r"methods\[1\]: weight: expected at most 1"),
        (
            [{"name": "x", "prompt": "a cat", "seed": 1}],
            r"methods\[0\]: got prompt, seed, which the benchmark says",
        ),
        ([{"name": "x", "control": "a.png"}], r"methods\[0\]: got control, which all methods share"),
        ([{"name": "x", "parts": "vk"}], r"methods\[0\]: parts: expected 'kv'"),
        ([{"name": "x", "strength": 1.5}], r"methods\[0\]: strength: expected a number above 0"),
        ([{"name": "x", "context_in": "vital"}], r"methods\[0\]: context_in: expected .* and a strength"),
        (
            [{"name": "x", "lora": ["a"], "quantize": "8bit", "parallel": 2}],
            r"methods\[0\]: got lora, parallel, quantize, which all methods share",
        ),
        (
            [{"name": "x", "strength": 0.5, "dose": "paper", "num_steps": 3}],
            r"methods\[0\]: got dose with strength: image-to-image has no use for that",
        ),
        (
            [{"name": "x", "mask": "a.png"}],
            r'methods\[0\]: mask: expected "given", "auto" or "none", got "a.png"',
        ),
        ([], "at least one"),
    ],
)
def test_wrong_methods_are_named(benchmark, tmp_path, methods, message):
    with pytest.raises(InputError, match=message):
        settings_of(benchmark, tmp_path, methods=methods)


@pytest.mark.parametrize("cls", [GenerateSettings, LayerSettings, SkipSettings, DinoSettings, EditSettings])
@pytest.mark.parametrize("form", ["file", "run.json"])
def test_each_program_names_the_one_that_a_file_is_for(tmp_path, cls, form):
    """An evaluation's file given to a demo, and a demo's given to an evaluation."""

    def read_another(reader, file):
        settings = read_settings(file, f"{file.demo}.json")
        path = tmp_path / "other.json"
        data = (CONFIGS / f"{file.demo}.json").read_text()
        path.write_text(data if form == "file" else json.dumps(run_record(settings)))
        with pytest.raises(InputError) as error:
            read_settings(reader, path)
        return str(error.value)

    for reader, file in ((cls, EvaluateSettings), (EvaluateSettings, cls)):
        message = read_another(reader, file)
        assert message.startswith(f"{tmp_path / 'other.json'}: got a ")
        assert file.program in message
        assert len(message.splitlines()) == 1


def test_what_does_not_go_together(benchmark, tmp_path):
    with pytest.raises(InputError, match='edits photos, but references is "generated"'):
        settings_of(benchmark, tmp_path, references="generated")
    with pytest.raises(InputError, match="reconstruct"):
        settings_of(benchmark, tmp_path, reconstruct=True, judge="measuring.pt")
