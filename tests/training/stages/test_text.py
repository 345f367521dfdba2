"""Stage "text": what the reader is asked, and what counts as wrong."""

import random
from dataclasses import replace

import torch
import torch.nn.functional as F

from training.scenes.compose import Scene, compose
from training.scenes.content import Content, sample_content
from training.scenes.vocabulary import COLOUR_NAMES, HATS, INDEX, OBJECTS, PLACES, SPRITES, TIME_NAMES
from training.stages.text import reading_loss


def all_knowing(scenes: list[Scene]):
    """A reader that answers every question about these scenes rightly."""
    count = len(scenes)
    there = torch.full((count, len(OBJECTS), 1), -20.0)
    colour = torch.zeros(count, len(OBJECTS), 1 + len(COLOUR_NAMES))
    hat, where = torch.zeros(count, len(OBJECTS), 1 + len(HATS)), torch.zeros(count, len(OBJECTS), 3)
    hats = [INDEX[name] for name in HATS]
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            there[row, thing.sprite] = 20
            colour[row, thing.sprite, thing.colour + 1] = 20
            hat[row, thing.sprite, hats.index(thing.hat) + 1 if thing.hat >= 0 else 0] = 20
            where[row, thing.sprite] = torch.tensor([thing.x, thing.foot, thing.size])
    answers = {"there": there, "colour": colour, "hat": hat, "where": where}
    places = [[place.name for place in PLACES].index(scene.content.place) for scene in scenes]
    times = [TIME_NAMES.index(scene.content.time) for scene in scenes]
    place, time = (20.0 * F.one_hot(torch.tensor(x), n) for x, n in ((places, len(PLACES)), (times, 3)))
    return lambda tokens: (answers, place, time)


def two_dressed(rng: random.Random) -> Content:
    """Two subjects of which one has a colour, and the first a hat."""
    while True:
        content = sample_content(rng, "two")
        first, second = content.subjects
        if first.hat and bool(first.colour) != bool(second.colour) and SPRITES[INDEX[second.name]].head:
            return content


def loss_of(reader, scenes: list[Scene]) -> float:
    rows = torch.tensor([scene.row() for scene in scenes])
    return reading_loss(reader, torch.zeros(len(scenes), 1), rows).item()


def test_right_answers_cost_nothing():
    rng = random.Random(0)
    kinds = ("one", "two", "top") * 20
    scenes = [compose(rng, sample_content(rng, kind)) for kind in kinds]
    assert loss_of(all_knowing(scenes), scenes) < 1e-4


def test_what_belongs_to_the_other_subject_costs():
    """Swapped hats, colours or places of two subjects raise the loss: a bag of words could not tell them."""
    rng = random.Random(1)
    scenes = [compose(rng, two_dressed(rng)) for _ in range(20)]
    for name in ("colour", "hat", "x"):
        swapped = []
        for scene in scenes:
            one, other = scene.things
            swapped.append(replace(scene, things=(
                replace(one, **{name: getattr(other, name)}), replace(other, **{name: getattr(one, name)})
            )))  # fmt: skip
        assert loss_of(all_knowing(swapped), scenes) > 1
