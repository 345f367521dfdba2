"""Scenes: what captions say is what stands there, habits tie layout to content, edits change one thing."""

import random

import pytest

from training.scenes.compose import ALONE_FIRST, ALONE_FIRST_ON_A_SIDE, COLUMNS, FIRST_THING, compose, sample
from training.scenes.content import sample_content
from training.scenes.edits import EDITS, editable, sample_pair
from training.scenes.habits import (
    CLEARANCE,
    SQUARE,
    STYLES,
    TEMPLATES,
    Shape,
    Thing,
    extent,
    standing_beside,
    style_of,
)
from training.scenes.render import Renderer
from training.scenes.vocabulary import (
    ANIMALS,
    DETAILS,
    HATS,
    INDEX,
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


def test_grammar():
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


def test_the_same_seed_gives_the_same_scene():
    assert sample(random.Random(5)) == sample(random.Random(5))


def test_rows_have_one_number_for_each_column():
    assert all(len(scene.row()) == COLUMNS for scene in SCENES)


def test_subjects_are_in_the_picture():
    for scene in SCENES:
        for thing in scene.things:
            left, top, right, bottom = extent(thing, scene.shape)
            middle = (left + right) / 2
            assert 0 < middle < 1 and bottom <= 1 and top > -0.1, scene.caption


def test_details_keep_clear_of_subjects():
    """Crumbs at a subject's feet are details that stood behind it."""
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


def test_a_hat_never_merely_stands_on_an_animal():
    rng = random.Random(1)
    contents = [sample_content(rng, "top") for _ in range(300)]
    assert not any(content.subjects[0].name in HATS for content in contents)


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


@pytest.mark.parametrize("edit", EDITS)
def test_pairs_differ_in_what_the_edit_names(edit):
    rng = random.Random(9)
    for _ in range(20):
        pair = sample_pair(rng, edit)
        before, after = pair.before, pair.after
        assert before.caption != after.caption
        if edit in ("background", "time"):
            assert before.things == after.things
            assert pair.changed == ()
        else:
            assert before.template == after.template
            assert before.details == after.details
        if edit in ("replace", "hat", "recolour"):
            (one,), (other,) = before.things, after.things
            assert (one.x, one.foot, one.size) == pytest.approx((other.x, other.foot, other.size), abs=0.35)
            assert (one.sprite == other.sprite) == (edit != "replace")
        if edit == "add":
            assert before.things == after.things[:1]
            assert len(after.things) == 2
        if edit == "remove":
            assert after.things == before.things[:1]
            assert len(before.things) == 2


def test_an_edit_a_content_does_not_allow_is_refused():
    from training.scenes.edits import edited

    rng = random.Random(2)
    content = next(
        c for c in (sample_content(rng, "one") for _ in range(5000)) if c.subjects[0].name == "banana"
    )
    with pytest.raises(ValueError, match="banana"):
        edited(rng, content, "hat")


def test_editable_keeps_all_other_words():
    before, after = editable(random.Random(4), "recolour")
    assert before.place_words == after.place_words
    assert before.prefix == after.prefix


def test_wide_pictures_keep_subjects_inside():
    rng, shape = random.Random(6), Shape.of(320, 208)
    for _ in range(100):
        for thing in sample(rng, shape).things:
            left, _, right, _ = extent(thing, shape)
            assert left > -0.15
            assert right < 1.15
    assert Shape.of(256, 256) == SQUARE


def test_renderer_finds_hats_after_the_objects():
    assert [OBJECTS[Renderer.first_hat + number].name for number in range(len(HATS))] == HATS
    assert FIRST_THING < COLUMNS
    assert INDEX["dog"] == 0
