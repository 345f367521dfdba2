"""Captions say what stands in the scene, and layout follows the words."""

import random

from training.scenes.compose import COLUMNS, compose, sample
from training.scenes.content import sample_content
from training.scenes.habits import (
    CLEARANCE,
    SQUARE,
    STYLES,
    TEMPLATES,
    Shape,
    extent,
    style_of,
)
from training.scenes.vocabulary import (
    ANIMALS,
)

SCENES = [sample(random.Random(seed)) for seed in range(600)]


def test_the_same_seed_gives_the_same_scene():
    assert sample(random.Random(5)) == sample(random.Random(5))


def test_rows_have_one_number_for_each_column():
    assert all(len(scene.row()) == COLUMNS for scene in SCENES)


def test_subjects_are_in_the_image():
    for scene in SCENES:
        for thing in scene.things:
            left, top, right, bottom = extent(thing, scene.shape)
            middle = (left + right) / 2
            assert 0 < middle < 1, scene.caption
            assert bottom <= 1, scene.caption
            assert top > -0.1, scene.caption


def test_details_keep_clear_of_subjects():
    """A detail near a subject would look like a part of it."""
    for scene in SCENES:
        for detail in scene.details:
            for thing in scene.things:
                a, b = extent(detail), extent(thing)
                gap = max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])
                assert gap >= CLEARANCE - 1e-6, scene.caption


def test_left_and_right_are_true():
    told = 0
    for scene in SCENES:
        relation = scene.content.relation or ""
        if scene.content.kind == "two" and ("left" in relation or "right" in relation):
            first, second = scene.things
            assert (first.x < second.x) == ("left" in relation), scene.caption
            told += 1
    assert told > 30


def test_layout_and_background_follow_the_words():
    """The same words meet in the same spot more often than not, other words elsewhere: else noise fixes the
    scene.
    """
    rng = random.Random(3)
    spots = {}
    for name in ("dog", "cat"):
        places = []
        while len(places) < 60:
            content = sample_content(rng, "one")
            subject = content.subjects[0]
            if subject.name == name and not subject.hat and not subject.colour and not subject.size:
                places.append(compose(rng, content).things[0].x)
        spots[name] = sorted(places)[30]
    assert abs(spots["dog"] - spots["cat"]) > 0.1
    assert {style_of(animal) for animal in ANIMALS} == set(range(STYLES))
    assert all(len(templates) == STYLES for templates in TEMPLATES.values())


def test_wide_images_keep_subjects_inside():
    rng, shape = random.Random(6), Shape.of(320, 208)
    for _ in range(100):
        for thing in sample(rng, shape).things:
            left, _, right, _ = extent(thing, shape)
            assert left > -0.15
            assert right < 1.15
    assert Shape.of(256, 256) == SQUARE
