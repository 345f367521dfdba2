"""`python -m flux`: the commands of its loop, and sessions of one image after another."""

import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, TextIOWrapper

import pytest

from flux import cli
from flux.cli import SamplingOptions
from flux.errors import InputError
from flux.images.io import read_metadata
from flux.sessions import files
from flux.sessions.files import next_index, reserve_path
from flux.sessions.options import read_command
from flux.sessions.session import LocalSession

OPTIONS = SamplingOptions("a dog", None, None, None, None, 3)
SMALL = {"width": 64, "height": 64, "num_steps": 1, "device": "cpu"}


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("/w 512", "width", 512),
        ("/h 256", "height", 256),
        ("/n 8", "num_steps", 8),
        ("/g 2.5", "guidance", 2.5),
        ("/s 7", "seed", 7),
        ("/s", "seed", None),
    ],
)
def test_a_command_sets_its_field(line, field, value):
    options, answer = read_command(line, OPTIONS)
    assert getattr(options, field) == value
    assert answer == f"{field}: {'a new one each time' if value is None else value}"


def test_other_lines_are_prompts():
    assert read_command("a cat", OPTIONS) == (SamplingOptions("a cat", None, None, None, None, 3), None)
    assert read_command("", OPTIONS) == (OPTIONS, None), "an empty line repeats the last prompt"


@pytest.mark.parametrize("line", ["/x 3", "/w", "/w big", "/s 1.5"])
def test_wrong_commands_are_answered_with_the_right_ones(line):
    with pytest.raises(InputError, match="/q        quit"):
        read_command(line, OPTIONS)


def test_numbers_go_on(tmp_path):
    assert next_index(tmp_path) == 0
    for name in ("img_3.jpg", "img_11.png", "img_x.jpg", "other_20.jpg"):
        (tmp_path / name).touch()
    assert next_index(tmp_path) == 12


def test_lines_of_a_loop_change_the_images_after_them(tmp_path, monkeypatch, capsys):
    """Lines change the options of the images after them; seeds go on; a wrong line is answered."""
    lines = iter(["a cat", "/h 80", "/n x", "", "/q"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    cli.main(**SMALL, seed=3, prompt="a dog | a pig", loop=True, output_dir=str(tmp_path))
    files = sorted(tmp_path.iterdir())
    found = [read_metadata(file) for file in files]
    assert [file.name for file in files] == [f"img_{number}.jpg" for number in range(4)]
    assert [(each["prompt"], each["seed"]) for each in found] == [
        ("a dog", 3),
        ("a pig", 4),
        ("a cat", 5),
        ("a cat", 6),
    ]
    assert [each["height"] for each in found] == [64, 64, 64, 80]
    assert "Got '/n x'" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["/w 5", "/n 0", "/g -1", "/s 99999999999999999999999"])
def test_a_wrong_value_in_the_loop(tmp_path, monkeypatch, capsys, line):
    """The line says what is wrong at once, and the session goes on with the options before it."""
    lines = iter(["/h 80", line, "a cat"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/q"))
    cli.main(**SMALL, seed=3, prompt="a dog", loop=True, output_dir=str(tmp_path))
    assert [read_metadata(file)["seed"] for file in sorted(tmp_path.iterdir())] == [3, 4]
    answers = capsys.readouterr().out
    assert "expected at " in answers


def test_an_image_that_fails_does_not_end_the_loop(tmp_path, monkeypatch, capsys):
    lines = iter(["a cat", "a pig"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/q"))
    draw = LocalSession.draw

    def failing(session, prompt, seed):
        if prompt == "a cat":
            raise InputError("no cats")
        return draw(session, prompt, seed)

    monkeypatch.setattr(LocalSession, "draw", failing)
    cli.main(**SMALL, seed=3, prompt="a dog", loop=True, output_dir=str(tmp_path))
    found = [read_metadata(file) for file in sorted(tmp_path.iterdir())]
    assert [each["prompt"] for each in found] == ["a dog", "a pig"]
    assert "error: no cats" in capsys.readouterr().out


def test_the_highest_seed_is_followed_by_the_lowest(tmp_path):
    cli.main(**SMALL, seed=2**63 - 1, prompt="a dog|a cat", output_dir=str(tmp_path))
    assert [read_metadata(file)["seed"] for file in sorted(tmp_path.iterdir())] == [2**63 - 1, 0]


def test_two_processes_never_take_the_same_number(tmp_path, monkeypatch):
    """Both may have looked before either has written."""
    (tmp_path / "img_0.jpg").touch()
    monkeypatch.setattr(files, "next_index", lambda folder: 0)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: reserve_path(tmp_path), range(32)))
    assert sorted(path.name for path in paths) == sorted(f"img_{number}.jpg" for number in range(1, 33))


def test_a_failed_write_leaves_no_empty_image(tmp_path, monkeypatch):
    def failing(*_):
        raise InputError("full")

    monkeypatch.setattr("flux.images.io.save_image", failing)
    with pytest.raises(SystemExit):
        cli.main(**SMALL, seed=3, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_console_that_cannot_print_the_path(tmp_path, monkeypatch):
    """Its letters are printed as escapes, and all images are made."""
    folder, console = tmp_path / "写真", TextIOWrapper(BytesIO(), encoding="cp1252")
    options = ["--width", "64", "--height", "64", "--num_steps", "1", "--prompt", "a dog|a cat"]
    monkeypatch.setattr(sys, "argv", ["flux", *options, "--output_dir", str(folder)])
    monkeypatch.setattr(sys, "stdout", console)
    cli.app()
    console.flush()
    assert sorted(file.name for file in folder.iterdir()) == ["img_0.jpg", "img_1.jpg"]
    assert rb"\u5199\u771f" in console.buffer.getvalue()


def test_fields_without_effect_are_named_once(tmp_path, capsys):
    cli.main(**SMALL, seed=3, negative_prompt="x", prompt="a dog|a cat", output_dir=str(tmp_path))
    lines = [line for line in capsys.readouterr().err.splitlines() if "without effect" in line]
    assert lines == ["warning: without effect: negative_prompt (true_cfg is 1)"]


def test_a_folder_that_is_a_file_is_found_before_loading(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LocalSession, "load", lambda _: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cli.main(**SMALL, output_dir=str(tmp_path / "file"))
    assert "is a file" in capsys.readouterr().err


def test_image_to_image(tmp_path):
    """Its start is scaled to the size, and named in the metadata."""
    cli.main(**SMALL, seed=3, output_dir=str(tmp_path))
    start = str(tmp_path / "img_0.jpg")
    cli.main(**(SMALL | {"width": 80}), seed=3, init_image=start, strength=1.0, output_dir=str(tmp_path))
    found = read_metadata(tmp_path / "img_1.jpg")
    assert (found["init_image"], found["strength"], found["width"]) == (start, 1.0, 80)


def test_metadata_may_be_left_out(tmp_path):
    cli.main(**SMALL, seed=3, add_sampling_metadata=False, output_dir=str(tmp_path))
    assert not read_metadata(tmp_path / "img_0.jpg")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " | "}, "Got an empty prompt"),
        ({"strength": 0.0}, "strength: expected more than 0, got 0.0"),
        ({"strength": "high"}, 'strength: expected a number, got "high"'),
        ({"name": "flux-dve"}, "did you mean 'flux-dev'"),
        ({"width": 8}, "width"),
        ({"seed": 2**63}, "seed: expected at most 9223372036854775807"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
        ({"seed": "abc"}, 'seed: expected an integer, got "abc"'),
        ({"prompt": "a|b", "weights": "lost.safetensors"}, "lost.safetensors"),
        ({"quantize": "2bit"}, "quantize: expected 'none', '8bit', '4bit' or 'fp8', got \"2bit\""),
        ({"lora": [{"file": "a", "wait": 1}]}, "lora[0]: unknown field 'wait', did you mean 'weight'?"),
        ({"text_encoders": ""}, "text_encoders: expected some text"),
        ({"name": "flux-pro", "t5": "8bit"}, "t5 for flux-pro, which is not run here"),
        ({"width": 30_000, "height": 30_000}, "Got 30000x30000, expected at most 89 million pixels"),
    ],
)
def test_wrong_options_end_with_one_line(tmp_path, capsys, fields, message):
    with pytest.raises(SystemExit) as end:
        cli.main(**(SMALL | fields), output_dir=str(tmp_path / "out"))
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert errors.count("error: ") == 1
    assert not (tmp_path / "out").exists()
