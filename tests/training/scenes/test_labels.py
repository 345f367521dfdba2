"""Labels are those of the scene."""

import pytest
import torch
import torch.nn.functional as F

from training.scenes.compose import compose
from training.scenes.content import sample_content
from training.scenes.labels import labels_of
from training.scenes.vocabulary import COLOUR_NAMES, INDEX


def test_labels_say_what_the_row_says():
    import random

    rng = random.Random(0)
    scenes = [compose(rng, sample_content(rng)) for _ in range(200)]
    labels = labels_of(torch.tensor([scene.row() for scene in scenes]))
    for number, scene in enumerate(scenes):
        content = scene.content
        names = {subject.name for subject in content.subjects} | {s.hat for s in content.subjects if s.hat}
        assert labels.objects[number].nonzero()[:, 0].tolist() == sorted(INDEX[name] for name in names)
        colours = {COLOUR_NAMES.index(s.colour) for s in content.subjects if s.colour}
        assert set(labels.colours[number].nonzero()[:, 0].tolist()) == colours
        assert labels.count[number] + 1 == len(scene.things)
        first = content.subjects[0]
        if content.kind == "one":
            assert labels.x[number, INDEX[first.name]] == pytest.approx(scene.things[0].x, abs=1e-6)
    assert F.one_hot(labels.place).shape[1] <= 16
