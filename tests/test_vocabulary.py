"""Words that flux-nano does not know are reported with similar ones."""

import pytest

from flux.specs import configs
from flux.vocabulary import unknown_words, warn_of_unknown_words

WORDS = configs["flux-nano"].vocabulary


def test_known_words_are_not_reported():
    assert unknown_words("A Dog, wearing a top hat. On the grass!", WORDS) == {}


def test_unknown_words_come_with_similar_ones():
    found = unknown_words("an elefant beside a zyzzyva", WORDS)
    assert list(found) == ["elefant", "zyzzyva"]
    assert "elephant" in found["elefant"]
    assert found["zyzzyva"] == []


def test_instructions_are_known_to_the_model_that_takes_them():
    text = "Replace the dog with a cat, put a top hat on it and make it night"
    assert unknown_words(text, configs["flux-nano-kontext"].vocabulary) == {}
    assert list(unknown_words(text, WORDS)) == ["replace", "put", "it", "make"]


def test_a_warning_names_the_word_similar_words_and_the_prompt():
    with pytest.warns(
        UserWarning, match=r"This model does not know 'elefant' \(near: elephant.*'an elefant'"
    ):
        warn_of_unknown_words(["a dog", "an elefant"], WORDS)


def test_the_pipeline_warns(nano):
    with pytest.warns(UserWarning, match="'skyscraper'"):
        nano.condition(["a dog on a skyscraper"], 3.5)


@pytest.mark.filterwarnings("error")
def test_known_prompts_do_not_warn(nano):
    nano.condition(["a dog on the grass", ""], 3.5)
