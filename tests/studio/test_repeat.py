"""The command and the Python code that the page copies repeat the run, bit for bit."""

import runpy
import shlex
import shutil
import sys

import pytest
from helpers.studio import ROOT, assert_same_image, finish
from PIL import Image

from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings
from flux.settings.edits import EditSettings
from flux.settings.files import check_settings
from flux.studio.forms import edit_settings, film_settings, generate_settings
from flux.studio.repeat import as_command, as_python
from flux.studio.work.edit import run_edit
from flux.studio.work.film import run_film
from flux.studio.work.generate import run_generate

pytestmark = pytest.mark.usefixtures("loads_once")

EDIT = {
    "prompt": "a dog's house",
    "edits": "-- a cat\n> a white cat",
    "layers": {"on": [0, 3]},
    "weight": 0.6,
}


@pytest.fixture
def made(studio, photo, request):
    """A run of that kind, with settings unlike any file's."""
    session, kind = studio.sessions.of("a"), request.param
    if kind == "images":
        return finish(
            run_generate(studio, session, generate_settings(studio, {"prompt": "a dog", "count": 2}))
        )
    if kind == "film":
        form = {"prompt": "a dog", "seed": 5, "layers": {"on": [1]}}
        return finish(run_film(studio, session, film_settings(studio, form)))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 32))
    settings = edit_settings(studio, {**EDIT, "seed": 3, "paste_back": True})
    return finish(run_edit(studio, session, settings, photo, mask))


def assert_repeated(made, folder):
    compared = [
        path for path in (*made.images.values(), *made.folder.glob("[lsw]*.png")) if path.stem != "picture"
    ]
    assert len(compared) >= 2
    for path in compared:
        assert_same_image(path, folder / path.name)


@pytest.mark.parametrize("made", ["images", "film", "edit"], indirect=True)
def test_copied_commands_and_programs_repeat_the_run(made, tmp_path, monkeypatch):
    """From a folder that has the run's input files."""
    here = tmp_path / "here"
    shutil.copytree(
        made.folder, here, ignore=shutil.ignore_patterns("0*", "edit_*", "reference*", "run.json")
    )
    monkeypatch.chdir(here)
    python, program, *arguments = shlex.split(as_command(made.settings))
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [program, *arguments, "--output_dir", "command"])
    runpy.run_path(str(ROOT / program), run_name="__main__")
    assert_repeated(made, here / "command")
    exec(compile(as_python(made.settings), "copied", "exec"), {})
    assert_repeated(made, here / "output")


def test_a_command_for_another_model_than_its_file_prints_nothing(capsys):
    settings = resolve(GenerateSettings(model="flux-nano-schnell", prompts=["a dog"]))
    settings = check_settings(GenerateSettings, settings.to_json())
    assert " --model flux-nano-schnell " in as_command(settings)
    assert capsys.readouterr() == ("", "")


def test_a_command_names_only_what_differs():
    """From configs/edit.json, whose numbers the page's may differ from."""
    fields = {"prompt": "a dog on the grass", "seed": 7, "edits": ["a cat"], "vital_layers": [0, 4]}
    settings = check_settings(EditSettings, {**fields, "num_steps": 20, "batch_size": 3})
    settings = check_settings(EditSettings, resolve(settings).to_json())  # as a run keeps them
    command = "python demo_4_edit.py edit.json --edits '[\"a cat\"]' --vital_layers '[0, 4]'"
    assert as_command(settings) == command
