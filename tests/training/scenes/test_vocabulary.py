"""Words, sprites and places fit together."""

import random

from training.scenes.compose import sample
from training.scenes.vocabulary import (
    DETAILS,
    OBJECTS,
    PLACES,
    SPRITES,
    all_words,
    plural,
    with_article,
)

SCENES = [sample(random.Random(seed)) for seed in range(600)]


def test_sixteen_places_and_every_detail_is_used_somewhere():
    assert len(PLACES) == 16
    assert len({sprite.name for sprite in SPRITES}) == len(SPRITES)
    used = {name for place in PLACES for name in place.details}
    assert used == {detail.name for detail in DETAILS}


def test_no_detail_looks_like_a_word_of_the_vocabulary():
    """An unnamed sprite that shares a word with a named object would teach that words may be ignored."""
    named = {word for sprite in OBJECTS for word in sprite.words}
    assert not named & {detail.name for detail in DETAILS}


def test_articles_and_plurals_are_right():
    assert with_article("owl") == "an owl"
    assert with_article("ufo") == "a ufo"
    assert with_article("dog") == "a dog"
    assert plural("bus") == "buses"
    assert plural("mouse") == "mice"
    assert plural("cup of coffee") == "cups of coffee"


def test_captions_use_known_words_only():
    known = set(all_words())
    for scene in SCENES:
        assert set(scene.caption.replace(",", " ").split()) <= known, scene.caption
