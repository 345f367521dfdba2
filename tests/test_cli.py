"""`python -m flux`: the commands of its loop, and sessions of one image after another."""

import pytest

from flux import cli
from flux.cli import SamplingOptions, next_index, read_command
from flux.errors import InputError
from flux.images.io import read_metadata

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
def test_commands(line, field, value):
    options, answer = read_command(line, OPTIONS)
    assert getattr(options, field) == value
    assert answer == f"{field}: {value}"


def test_prompts():
    assert read_command("a cat", OPTIONS) == (SamplingOptions("a cat", None, None, None, None, 3), None)
    assert read_command("", OPTIONS) == (OPTIONS, None), "an empty line repeats the last prompt"


@pytest.mark.parametrize("line", ["/x 3", "/w", "/w big", "/s 1.5"])
def test_wrong_commands(line):
    with pytest.raises(InputError, match="/q     quit"):
        read_command(line, OPTIONS)


def test_numbers_go_on(tmp_path):
    assert next_index(tmp_path) == 0
    for name in ("img_3.jpg", "img_11.png", "img_x.jpg", "other_20.jpg"):
        (tmp_path / name).touch()
    assert next_index(tmp_path) == 12


def test_a_loop(tmp_path, monkeypatch, capsys):
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


def test_image_to_image(tmp_path):
    """Its start is scaled to the size, and named in the metadata."""
    cli.main(**SMALL, seed=3, output_dir=str(tmp_path))
    start = str(tmp_path / "img_0.jpg")
    cli.main(**(SMALL | {"width": 80}), seed=3, init_image=start, strength=1.0, output_dir=str(tmp_path))
    found = read_metadata(tmp_path / "img_1.jpg")
    assert (found["init_image"], found["strength"], found["width"]) == (start, 1.0, 80)


def test_without_metadata(tmp_path):
    cli.main(**SMALL, seed=3, add_sampling_metadata=False, output_dir=str(tmp_path))
    assert not read_metadata(tmp_path / "img_0.jpg")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " | "}, "Got an empty prompt"),
        ({"strength": 0.0}, "Got strength 0.0"),
        ({"width": 8}, "width"),
    ],
)
def test_wrong_options(tmp_path, capsys, fields, message):
    with pytest.raises(SystemExit) as end:
        cli.main(**(SMALL | fields), output_dir=str(tmp_path / "out"))
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
