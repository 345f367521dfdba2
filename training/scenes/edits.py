"""Draws pairs of scenes: the same scene before and after an edit.

pair = sample_pair(random.Random(0), "hat")
"""

import random
from dataclasses import dataclass, replace

from training.scenes.compose import Scene, compose, placed
from training.scenes.content import (
    Content,
    draw_name,
    draw_place,
    draw_subject,
    draw_time,
    draw_word,
    sample_content,
    with_hat,
)
from training.scenes.habits import SQUARE, Shape, cleared, fitted, standing_beside, style_of, template
from training.scenes.vocabulary import COLOUR_NAMES, HATS, INDEX, PLACE_INDEX, PLACES, SPRITES

EDITS = ("replace", "hat", "add", "remove", "recolour", "background", "time")


def edited(rng: random.Random, content: Content, edit: str) -> Content:
    """Edit the content of a single subject. All other words stay.

    Args:
        rng: The source of chance.
        content: The content before the edit.
        edit: One of `EDITS` except "remove", which is "add" read backwards.

    Raises:
        ValueError: this content does not allow the edit (a hat on a car, night on a table).
    """
    subject = content.subjects[0]
    sprite = SPRITES[INDEX[subject.name]]
    if edit == "replace":
        other = draw_name(rng, other_than=(subject.name, *HATS))
        while subject.hat and SPRITES[INDEX[other]].head is None:
            other = draw_name(rng, other_than=(subject.name, *HATS))
        colour = subject.colour if SPRITES[INDEX[other]].recolourable else None
        return replace(
            content, subjects=(replace(subject, name=other, word=draw_word(rng, other), colour=colour),)
        )
    if edit == "hat" and sprite.head:
        return replace(content, subjects=(with_hat(rng, subject, other_than=subject.hat),))
    if edit == "add":
        second = draw_subject(rng, draw_name(rng, other_than=(subject.name, *HATS)))
        relation = rng.choice(("and", "next to", "beside", "with"))
        return replace(content, kind="two", subjects=(subject, second), relation=relation)
    if edit == "recolour" and sprite.recolourable:
        colour = rng.choice([name for name in COLOUR_NAMES if name != subject.colour])
        return replace(content, subjects=(replace(subject, colour=colour),))
    if edit == "background":
        place = draw_place(rng, other_than=content.place)
        time = {}
        if not PLACES[PLACE_INDEX[place["place"]]].outdoors:
            time = {"time": "day", "time_words": ""}
        return replace(content, **place, **time)
    if edit == "time" and PLACES[PLACE_INDEX[content.place]].outdoors:
        return replace(content, **draw_time(rng, content.place, other_than=content.time))
    raise ValueError(f'Got the edit "{edit}" for "{content.caption}", which does not allow it')


def editable(rng: random.Random, edit: str) -> tuple[Content, Content]:
    """Draw the content of a single subject, and the content after the edit."""
    while True:
        content = sample_content(rng, "one")
        try:
            return content, edited(rng, content, edit)
        except ValueError:
            continue


@dataclass(frozen=True)
class Pair:
    """The same scene before and after an edit.

    Attributes:
        edit: One of `EDITS`.
        before: The scene before.
        after: The scene after.
        changed: The numbers of the things that differ. If empty, everything else differs.
    """

    edit: str
    before: Scene
    after: Scene
    changed: tuple[int, ...]


def sample_pair(rng: random.Random, edit: str, shape: Shape = SQUARE) -> Pair:
    """Draw a scene before and after an edit. Everything that the edit does not name stays where it is."""
    content, other = editable(rng, "add" if edit == "remove" else edit)
    scene = compose(rng, content, shape)
    (thing,) = scene.things
    subject = other.subjects[0]
    changed, things = (0,), (thing,)
    if edit in ("add", "remove"):
        added = other.subjects[1]
        thing, second, _ = standing_beside(rng, thing, SPRITES[INDEX[added.name]], added.colour, shape, None)
        thing = fitted(thing, shape)
        changed, things = (1,), (thing, second)
    elif edit in ("replace", "hat", "recolour"):
        things = (fitted(placed(subject, thing.x, thing.foot, thing.size), shape),)
        # The wearer may have to move down to make room. Then it stands there before the edit too.
        if edit == "hat":
            thing = replace(thing, x=things[0].x, foot=things[0].foot)
    else:
        changed = ()
    background = after_background = scene.template
    if not changed:
        after_background = template(rng, PLACES[PLACE_INDEX[other.place]], other.time, style_of(subject.name))
    everything = [thing, *things]
    before = Scene(content, (thing,), background, shape, cleared(background.details, everything, shape))
    after = Scene(
        other, things, after_background, shape, cleared(after_background.details, everything, shape)
    )
    if edit == "remove":
        before, after = after, before
    return Pair(edit, before, after, changed)
