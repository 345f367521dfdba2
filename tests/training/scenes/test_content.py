"""The contents of scenes."""

import random

from training.scenes.content import sample_content
from training.scenes.vocabulary import (
    HATS,
)


def test_a_hat_never_merely_stands_on_an_animal():
    rng = random.Random(1)
    contents = [sample_content(rng, "top") for _ in range(300)]
    assert not any(content.subjects[0].name in HATS for content in contents)
