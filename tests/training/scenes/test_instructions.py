"""Instructions name what changes, and nothing of what they replace but its noun."""

import random

import pytest

from flux.specs import configs
from flux.vocabulary import known_words, unknown_words
from training.scenes.edits import EDITS, sample_pair
from training.scenes.instructions import instruction, instruction_words


@pytest.mark.parametrize("edit", EDITS)
def test_an_instruction_names_what_changes(edit):
    rng = random.Random(0)
    for _ in range(40):
        pair = sample_pair(rng, edit)
        before, after = pair.before.content, pair.after.content
        text = instruction(rng, pair)
        asked = {
            "replace": after.subjects[0].word,
            "add": after.subjects[-1].word,
            "remove": before.subjects[-1].word,
            "recolour": after.subjects[0].colour,
            "background": after.place_words,
        }
        assert asked.get(edit, "") in text
        assert "{" not in text
        assert "None" not in text


def test_chance_decides_the_words():
    pair = sample_pair(random.Random(0), "hat")
    assert len({instruction(random.Random(seed), pair) for seed in range(20)}) > 2


def test_the_words_of_instructions_are_those_that_the_package_knows():
    file, rng = configs["flux-nano-kontext"].vocabulary, random.Random(0)
    assert known_words(file) == set(instruction_words())
    texts = [instruction(rng, sample_pair(rng, edit)) for edit in EDITS for _ in range(40)]
    assert [text for text in texts if unknown_words(text, file)] == []
