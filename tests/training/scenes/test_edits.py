"""Edits change one thing."""

import random

import pytest

from training.scenes.content import sample_content
from training.scenes.edits import EDITS, editable, sample_pair


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
