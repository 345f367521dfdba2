"""Habits tie the layout to the content."""

import random

from training.scenes.compose import ALONE_FIRST, ALONE_FIRST_ON_A_SIDE, sample
from training.scenes.habits import (
    SQUARE,
    Thing,
    extent,
    standing_beside,
)
from training.scenes.vocabulary import (
    INDEX,
    SPRITES,
)

SCENES = [sample(random.Random(seed)) for seed in range(600)]


def test_an_added_subject_leaves_the_first_where_it_stands():
    """Where there is room, and in nearly a quarter of all scenes: what an added object looks like."""
    rng = random.Random(8)
    unmoved = 0
    for _ in range(100):
        first = Thing(INDEX["dog"], rng.uniform(0.2, 0.8), 0.9, rng.uniform(0.35, 0.5))
        same, second, right = standing_beside(rng, first, SPRITES[INDEX["apple"]], None, SQUARE, None)
        a, b = extent(same), extent(second)
        assert (b[0] >= a[2]) if right else (b[2] <= a[0])
        unmoved += same == first
    assert unmoved > 85
    told = [" of" in scene.content.relation for scene in SCENES if scene.content.kind == "two"]
    alone = sum(ALONE_FIRST_ON_A_SIDE if side else ALONE_FIRST for side in told)
    assert alone / len(SCENES) > 0.23
