"""Sets of images to train LoRAs on, as folders: alone, and as pairs for Kontext."""

import numpy as np
import pytest
from helpers.commands import run
from PIL import Image

from flux.errors import InputError
from flux.lora.dataset import read_training_set
from flux.settings.files import check_settings
from flux.settings.train import TrainSettings
from flux.specs import configs
from flux.vocabulary import vocabulary_warnings
from training.subjects import NAMES, STYLES, draw_set, instruction_for, write_set


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("name", NAMES)
def test_the_scene_before_is_the_same_without_the_subject_or_style(name):
    for drawn in draw_set(name, 2, 64):
        differs = (pixels(drawn.before) != pixels(drawn.image)).any(axis=2)
        if name in STYLES:
            assert np.array_equal(pixels(STYLES[name](drawn.before)), pixels(drawn.image))
            assert differs.mean() > 0.5
        else:
            assert 0.05 < differs.mean() < 0.45
            assert not differs[:8].any()
            assert not differs[:, :8].any()


@pytest.mark.parametrize("name", NAMES)
def test_instructions_have_words_that_kontext_knows(name):
    spec = configs["flux-nano-kontext"]
    assert not vocabulary_warnings([instruction_for(name)], spec.vocabulary)


def test_pairs_are_a_folder_that_kontext_trains_on(tmp_path):
    write_set(tmp_path, "moon drum", 3, 64, pairs=True)
    settings = check_settings(TrainSettings, {"model": "flux-nano-kontext", "images": str(tmp_path)})
    examples = read_training_set(settings, configs["flux-nano-kontext"]).examples
    assert [example.caption for example in examples] == ["add a moon drum"] * 3
    for example, drawn in zip(examples, draw_set("moon drum", 3, 64), strict=True):
        for path, image in ((example.path, drawn.image), (example.context, drawn.before)):
            assert np.array_equal(pixels(Image.open(path)), pixels(image))


def test_sets_are_not_mixed(tmp_path):
    """The same set is written again; a smaller one, or one of no pairs, would leave images of the first."""
    for _ in range(2):
        write_set(tmp_path, "moon drum", 2, 64, pairs=True)
    for count, pairs in ((1, True), (2, False)):
        with pytest.raises(InputError, match=r"where another set's .*\.png is: name another folder"):
            write_set(tmp_path, "moon drum", count, 64, pairs=pairs)


def test_the_command(tmp_path, monkeypatch, capsys):
    ended = run(
        "training.subjects",
        [str(tmp_path / "a"), "--count", "1", "--side", "64", "--pairs"],
        monkeypatch,
        capsys,
    )
    assert ended.status == 0
    assert sorted(str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*")) == [
        "00.png",
        "00.txt",
        "context/00.png",
    ]
    for option, value, smallest in (("--count", "0", 1), ("--side", "-4", 64), ("--side", "x", 64)):
        ended = run("training.subjects", [str(tmp_path / "b"), option, value], monkeypatch, capsys)
        assert ended.status == 2
        message = f"error: argument {option}: got {value}, expected a whole number from {smallest} on"
        assert ended.output.splitlines() == [message]
        assert not (tmp_path / "b").exists()
