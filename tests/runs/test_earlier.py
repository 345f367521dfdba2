"""Images that an earlier, longer run left in an output folder: they stay, and are named."""

from pathlib import Path

import pytest
from PIL import Image

from flux.errors import InputWarning
from flux.images.io import save_image
from flux.results import write_images
from flux.runs.earlier import warn_of_earlier_images
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, LayerSettings

IMAGE = Image.new("RGB", (16, 16), "green")


def generate(folder: Path, count: int) -> None:
    given = GenerateSettings(prompts=["a dog"] * count, output_dir=str(folder))
    write_images(resolve(given), [IMAGE] * count, {})


@pytest.mark.parametrize(
    ("count", "named"), [(3, "also holds 002.png of"), (7, r"holds 002.png to 006.png \(5 images\) of")]
)
def test_images_of_a_longer_run_stay_and_are_named(tmp_path, count, named):
    generate(tmp_path, count)
    with pytest.warns(InputWarning, match=named):
        generate(tmp_path, 2)
    assert len(list(tmp_path.glob("0*.png"))) == count


def test_a_run_that_replaces_all_images_and_other_files_need_no_word(tmp_path, recwarn):
    for name in ("the best.png", "notes.txt"):
        (tmp_path / name).touch()
    for count in (2, 2, 3):
        generate(tmp_path, count)
    assert not recwarn


def test_films_in_folders_of_their_own_are_named(tmp_path):
    settings = resolve(LayerSettings(prompt="a dog", output_dir=str(tmp_path)))
    save_image(IMAGE, tmp_path / "prompt_001" / "steps.png")
    save_image(IMAGE, tmp_path / "steps.png")
    with pytest.warns(InputWarning, match="also holds prompt_001/steps.png of an earlier run"):
        warn_of_earlier_images(settings, [tmp_path / "steps.png"])
