"""flux-nano learns a subject that it has never seen, from ten images, and other prompts stay."""

import numpy as np
import pytest
from PIL import Image

from flux.lora.samples import Distances, mean_of_steps, plot_curves, read_curves
from flux.lora.train import make_plan, train
from flux.settings.files import check_settings, read_settings
from flux.settings.train import TrainSettings
from training.subjects import NAMES, SUBJECTS, draw_set, write_set

pytestmark = pytest.mark.gradients

SUBJECT = "flower bell"


def test_it_learns_a_subject_and_other_prompts_stay(tmp_path):
    """By DINOv2: the distance to the nearest training image falls from 0.26 to 0.04, while a prompt without
    the trigger moves by 0.04, and one with it by 0.29. 40 of the 300 steps of configs/train.json, on smaller
    images.
    """
    write_set(tmp_path / "images", SUBJECT, 10, side=192)
    fields = {
        "images": str(tmp_path / "images"), "trigger": SUBJECT, "learning_rate": 4e-3, "steps": 40,
        "sample_every": 40, "save_every": 40, "width": 192, "height": 192, "num_steps": 4, "device": "cpu",
        "sample_prompts": ["a [trigger] on the grass", "a dog on the grass"],
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    train(check_settings(TrainSettings, fields))
    rows = read_curves(tmp_path / "out")
    (before, after), (_, other) = (mean_of_steps(rows, has_trigger) for has_trigger in (True, False))
    assert after.to_nearest < 0.4 * before.to_nearest
    assert after.to_training < before.to_training - 0.08
    assert other.to_base < 0.25 * after.to_base


def test_the_demo_trains_on_a_folder_of_drawn_images(tmp_path):
    """Its settings fit what `training.subjects` draws, and the vital layers of flux-nano."""
    write_set(tmp_path, SUBJECT, 2)
    plan = make_plan(read_settings(TrainSettings, "train.json", {"images": str(tmp_path), "device": "cpu"}))
    assert plan.layers == (0, 4)
    assert plan.forecast.parameters == 2 * 16 * 10240
    assert [plan.settings.trigger in prompt for prompt in plan.prompts] == [True, True, False]


@pytest.mark.parametrize("name", NAMES)
def test_sets_are_drawn(name):
    """Captions have only words that flux-nano knows, the name among them. Drawn again, all is the same."""
    from flux.specs import configs
    from flux.vocabulary import vocabulary_warnings

    drawn, again = draw_set(name, 3, 128), draw_set(name, 3, 128)
    captions = [each.caption for each in drawn]
    assert all(name in caption for caption in captions)
    assert not vocabulary_warnings(captions, configs["flux-nano"].vocabulary)
    assert captions == [each.caption for each in again]
    assert all(np.array_equal(one.image, two.image) for one, two in zip(drawn, again))
    assert len({each.image.tobytes() for each in drawn}) == 3
    assert all(each.image.size == (128, 128) for each in drawn)


def test_subjects_differ_from_their_places():
    """A subject covers a good part of its image, and looks like no other one."""
    colours = {
        name: np.asarray(draw_set(name, 1, 128)[0].image)[60:110, 40:90].mean((0, 1)) for name in SUBJECTS
    }
    for name, colour in colours.items():
        assert min(abs(colour - other).max() for each, other in colours.items() if each != name) > 10, name


def test_means_of_steps():
    rows = [
        Distances(0, "a", True, 0.4, 0.2, 0.0),
        Distances(0, "b", True, 0.2, 0.1, 0.0),
        Distances(0, "c", False, 0.9, 0.9, 0.0),
        Distances(5, "a", True, 0.3, 0.1, 0.5),
    ]
    with_trigger = mean_of_steps(rows, True)
    assert [(row.step, round(row.to_training, 6)) for row in with_trigger] == [(0, 0.3), (5, 0.3)]
    assert [(row.step, row.to_training) for row in mean_of_steps(rows, False)] == [(0, 0.9)]


def test_curves_are_drawn_from_the_first_step_on(tmp_path):
    """Without a loss yet, and with prompts of one kind only."""
    rows = [Distances(0, "a", True, 0.4, 0.2, 0.0)]
    plot_curves(rows, [], tmp_path / "first.png")
    plot_curves([*rows, Distances(50, "a", True, 0.3, 0.1, 0.2)], [0.5] * 50, tmp_path / "second.png")
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("first", "second"))
    assert first.shape == second.shape
    assert not np.array_equal(first, second)
