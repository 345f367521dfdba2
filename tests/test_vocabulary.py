"""Words that flux-nano does not know are named, with near ones."""

import pytest

from flux.specs import configs
from flux.vocabulary import unknown_words, warn_of_unknown_words

WORDS = configs["flux-nano"].vocabulary


def test_known_words_are_not_named():
    assert unknown_words("A Dog, wearing a top hat. On the grass!", WORDS) == {}


def test_unknown_words_come_with_near_ones():
    found = unknown_words("an elefant beside a zyzzyva", WORDS)
    assert list(found) == ["elefant", "zyzzyva"]
    assert "elephant" in found["elefant"]
    assert found["zyzzyva"] == []


def test_warning_names_word_near_words_and_prompt():
    with pytest.warns(
        UserWarning, match=r"This model does not know 'elefant' \(near: elephant.*'an elefant'"
    ):
        warn_of_unknown_words(["a dog", "an elefant"], WORDS)


def test_pipeline_warns(nano):
    with pytest.warns(UserWarning, match="'skyscraper'"):
        nano.condition(["a dog on a skyscraper"], 3.5)


@pytest.mark.filterwarnings("error")
def test_known_prompts_are_silent(nano):
    nano.condition(["a dog on the grass", ""], 3.5)
