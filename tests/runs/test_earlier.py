"""What an earlier, longer run left in an output folder: its images go, all other files stay."""

from pathlib import Path

import pytest
from PIL import Image

from flux.errors import InputWarning
from flux.images.io import save_image
from flux.results import write_images
from flux.runs.earlier import remove_earlier_images
from flux.runs.record import image_metadata
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, LayerSettings
from flux.settings.edits import EditSettings

IMAGE = Image.new("RGB", (16, 16), "green")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def generate(folder: Path, count: int, **fields) -> None:
    given = GenerateSettings(prompts=["a dog"] * count, output_dir=str(folder), **fields)
    write_images(resolve(given), [IMAGE] * count, {})


def test_images_of_a_longer_run_are_removed(tmp_path, capsys):
    generate(tmp_path, 5)
    generate(tmp_path, 2)
    assert files(tmp_path) == {"000.png", "001.png", "grid.png", "run.json"}
    assert capsys.readouterr().err == (
        f"removed from {tmp_path} what an earlier run left: 002.png, 003.png, 004.png\n"
    )


def test_what_the_demo_did_not_make_stays(tmp_path):
    generate(tmp_path, 1)
    save_image(IMAGE, tmp_path / "002.png")  # without metadata
    (tmp_path / "003.png").write_text("no image")
    edit = EditSettings(prompt="a dog", edits=["a cat"])
    save_image(IMAGE, tmp_path / "004.png", image_metadata(resolve(edit), "a cat", 0))
    others = files(tmp_path)
    with pytest.warns(InputWarning, match=r"also holds 002.png, 003.png, 004.png, which this run did not"):
        generate(tmp_path, 1)
    assert files(tmp_path) == others


def test_images_under_other_names_stay_without_a_word(tmp_path, recwarn, capsys):
    generate(tmp_path, 2)
    (tmp_path / "001.png").rename(tmp_path / "the best.png")
    generate(tmp_path, 1)
    assert files(tmp_path) == {"000.png", "the best.png", "grid.png", "run.json"}
    assert not recwarn
    assert not capsys.readouterr().err


def film(folder: Path, *names: str) -> tuple:
    settings = resolve(LayerSettings(prompt="a dog", output_dir=str(folder)))
    for name in names:
        known = None if "steps." in name else image_metadata(settings, "a dog", 0)
        save_image(IMAGE, folder / name, known)
    return settings, [folder / name for name in names]


@pytest.mark.parametrize("other", ["", "prompt_000/"])
def test_folders_of_films(tmp_path, other):
    """A film alone follows two films, whose folders go; and the other way round."""
    old = [f"{other and 'prompt_001/'}{name}.png" for name in ("step_00_noisy", "step_01_clean", "steps")]
    film(tmp_path, *old)
    new = [f"{'' if other else 'prompt_000/'}{name}.png" for name in ("step_00_noisy", "steps")]
    remove_earlier_images(*film(tmp_path, *new))
    assert files(tmp_path) == set(new)
    assert not (tmp_path / "prompt_001").exists()


def test_a_folder_that_holds_more_stays(tmp_path):
    film(tmp_path, "prompt_000/step_00_noisy.png", "prompt_000/steps.png")
    (tmp_path / "prompt_000" / "notes.txt").touch()
    remove_earlier_images(*film(tmp_path, "step_00_noisy.png", "steps.png"))
    assert files(tmp_path) == {"step_00_noisy.png", "steps.png", "prompt_000/notes.txt"}
