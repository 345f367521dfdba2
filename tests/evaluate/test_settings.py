"""The fields of an evaluation's file."""

import pytest
from helpers.evaluation import settings_of

from flux.errors import InputError
from flux.evaluate.settings import EvaluateSettings, methods_of
from flux.settings.complete import resolve
from flux.settings.files import check_settings, read_settings


@pytest.mark.parametrize(
    "file",
    ["evaluate", "evaluate_inversions", "evaluate_strength", "evaluate_generated", "flux-dev/evaluate"],
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
        ([{"name": "a b"}, {"name": "A-b"}], "names of their own, got"),
        ([{"name": "truth"}], "names of their own, got 'truth'"),
        (
            [{"name": "x", "inverson": "euler"}],
            r"methods\[0\]: unknown field 'inverson', did you mean 'inversion'",
        ),
        ([{"name": "x"}, {"name": "y", "weight": 2.0}], r"methods\[1\]: weight: expected at most 1"),
        (
            [{"name": "x", "prompt": "a cat", "seed": 1}],
            r"methods\[0\]: got prompt, seed, which all methods share",
        ),
        ([{"name": "x", "strength": 1.5}], r"methods\[0\]: expected a strength in 0..1"),
        ([], "at least one"),
    ],
)
def test_wrong_methods_are_named(benchmark, tmp_path, methods, message):
    with pytest.raises(InputError, match=message):
        settings_of(benchmark, tmp_path, methods=methods)


def test_what_does_not_go_together(benchmark, tmp_path):
    with pytest.raises(InputError, match="strength"):
        settings_of(benchmark, tmp_path, references="generated")
    with pytest.raises(InputError, match="reconstruct"):
        settings_of(benchmark, tmp_path, reconstruct=True, judge="measuring.pt")
