"""Images: every place paints, seeds repeat, pairs are equal where nothing was edited."""

import random

import pytest
import torch

from training.scenes.compose import COLUMNS, FIRST_THING, Scene, Shape, sample
from training.scenes.content import Content, Subject
from training.scenes.edits import EDITS, sample_pair
from training.scenes.habits import TEMPLATES, Thing
from training.scenes.render import Renderer
from training.scenes.vocabulary import COLOUR_NAMES, HATS, INDEX, OBJECTS, PLACES, TIME_NAMES

SIDE = 64


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


def one_thing(thing: Thing, place: str = "plain", time: str = "day") -> Scene:
    content = Content("one", (Subject("dog", "dog"),), place, "", time, "", plain_colour="white")
    return Scene(content, (thing,), TEMPLATES[place, time][0])


def rows_of(*scenes: Scene) -> torch.Tensor:
    return torch.tensor([scene.row() for scene in scenes])


def test_every_place_and_time_paints(renderer):
    thing = Thing(INDEX["dog"], 0.5, 0.9, 0.5)
    scenes = [one_thing(thing, p.name, t) for p in PLACES for t in TIME_NAMES if (p.name, t) in TEMPLATES]
    images = renderer(rows_of(*scenes), SIDE, SIDE, seed=0)
    assert images.shape == (len(scenes), 3, SIDE, SIDE)
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1
    # No two of them alike.
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(len(scenes))
    assert distances.min() > 2


def test_a_seed_repeats_an_image(renderer):
    rows = rows_of(*(sample(random.Random(seed)) for seed in range(6)))
    first, again, other = (renderer(rows, SIDE, SIDE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_night_is_darker_than_day(renderer):
    thing = Thing(INDEX["cat"], 0.5, 0.9, 0.5)
    scenes = [one_thing(thing, "grass", time) for time in TIME_NAMES]
    day, night, sunset = renderer(rows_of(*scenes), SIDE, SIDE, seed=0).mean(dim=(1, 2, 3))
    assert night < 0.6 * day
    assert night < sunset < day


def test_a_recoloured_thing_has_its_colour(renderer):
    """Red, green and blue cars are mostly that."""
    for channel, colour in enumerate(("red", "green", "blue")):
        scene = one_thing(Thing(INDEX["car"], 0.5, 0.9, 0.8, COLOUR_NAMES.index(colour)))
        image, opacity, _ = renderer.with_masks(rows_of(scene), SIDE, SIDE, seed=0)
        mean = (image * opacity[:, :1]).sum(dim=(0, 2, 3))
        assert mean.argmax() == channel


def test_a_hat_sits_on_top(renderer):
    plain = one_thing(Thing(INDEX["penguin"], 0.5, 0.95, 0.5))
    hatted = one_thing(Thing(INDEX["penguin"], 0.5, 0.95, 0.5, hat=INDEX["top hat"]))
    _, opacity, _ = renderer.with_masks(rows_of(plain, hatted), SIDE, SIDE, seed=0)
    tops = [(mask.amax(dim=(0, 2)) > 0.5).nonzero()[0].item() for mask in opacity]
    assert tops[1] < tops[0] - 5


@pytest.mark.parametrize("edit", EDITS)
def test_pairs_are_equal_outside_their_mask(renderer, edit):
    pairs = [sample_pair(random.Random(seed), edit) for seed in range(4)]
    before, after, changed = renderer.pairs(pairs, SIDE, SIDE)
    difference = (before - after).abs().amax(dim=1, keepdim=True)
    assert difference[changed].max() > 0.02
    if edit in ("background", "time"):
        assert 0.3 < changed.float().mean() < 1
    else:
        assert difference[~changed].max() == 0


def test_images_may_be_wide(renderer):
    shape = Shape.of(96, 64)
    rows = rows_of(*(sample(random.Random(seed), shape) for seed in range(4)))
    assert renderer(rows, 96, 64).shape == (4, 3, 64, 96)


def test_renderer_finds_hats_after_the_objects():
    assert [OBJECTS[Renderer.first_hat + number].name for number in range(len(HATS))] == HATS
    assert FIRST_THING < COLUMNS
    assert INDEX["dog"] == 0
