"""Composes scenes: places what a content names, and chooses its background.

A scene becomes one row of numbers, which `training.scenes.render` turns into an image, thousands at a time.

    scene = sample(random.Random(0))
    print(scene.caption)
"""

import random
from dataclasses import dataclass, field, replace

from training.scenes.content import Content, Subject, sample_content
from training.scenes.habits import (
    HABIT,
    OBJECT_FOOT,
    OBJECT_SHIFT,
    SQUARE,
    STYLES,
    Shape,
    Template,
    Thing,
    cleared,
    extent,
    fitted,
    standing_alone,
    standing_beside,
    style_of,
    template,
)
from training.scenes.vocabulary import COLOUR_NAMES, INDEX, PLACE_INDEX, PLACES, SPRITES, TIME_NAMES

ALONE_FIRST = 0.85  # share of two-object scenes whose first object stands as it would alone
ALONE_FIRST_ON_A_SIDE = 0.4  # the same where words say left or right, which must tell more than habits do
# The columns of a scene's row: place, time, plain colour and the template's eight numbers; then six numbers
# for each detail of the background and for each subject.
DETAIL_SLOTS, THING_SLOTS, SLOT_WIDTH, HEADER = 3, 4, 6, 11
FIRST_DETAIL = HEADER
FIRST_THING = HEADER + DETAIL_SLOTS * SLOT_WIDTH
COLUMNS = FIRST_THING + THING_SLOTS * SLOT_WIDTH
NOTHING = Thing(-1, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Scene:
    """A content with its composition.

    Attributes:
        content: What the scene shows.
        things: The subjects, back to front.
        template: The background.
        shape: The shape of the image.
        details: The details of the background that are not in the subjects' way.
    """

    content: Content
    things: tuple[Thing, ...]
    template: Template
    shape: Shape = SQUARE
    details: tuple[Thing, ...] = field(default=())

    @property
    def caption(self) -> str:
        """The content's caption."""
        return self.content.caption

    def row(self) -> list[float]:
        """Return the `COLUMNS` numbers that the renderer reads."""
        c, t = self.content, self.template
        plain = COLOUR_NAMES.index(c.plain_colour) if c.plain_colour else 0
        row = [PLACE_INDEX[c.place], TIME_NAMES.index(c.time), plain]
        row += [t.horizon, t.sun_x, t.sun_y, t.clouds, t.hills, t.phase, t.sky_tint, t.ground_tint]
        for slots, things in ((DETAIL_SLOTS, self.details), (THING_SLOTS, self.things)):
            for slot in range(slots):
                thing = things[slot] if slot < len(things) else NOTHING
                row += [thing.sprite, thing.x, thing.foot, thing.size, thing.colour, thing.hat]
        return row


def _alone(rng: random.Random, content: Content, shape: Shape) -> Thing:
    subject = content.subjects[0]
    sprite = SPRITES[INDEX[subject.name]]
    thing = standing_alone(
        rng, sprite, content.place, content.time, subject.colour, subject.hat, subject.size
    )
    return fitted(thing, shape)


def placed(subject: Subject, x: float, foot: float, size: float) -> Thing:
    """Place a subject."""
    colour = COLOUR_NAMES.index(subject.colour) if subject.colour else -1
    return Thing(INDEX[subject.name], x, foot, size, colour, INDEX[subject.hat] if subject.hat else -1)


def _side_words(rng: random.Random, second_on_the_right: bool) -> str:
    """Say where the first stands, seen from the second."""
    return rng.choice(("to the {} of", "on the {} of")).format("left" if second_on_the_right else "right")


def _compose_two(rng: random.Random, content: Content, shape: Shape) -> tuple[Content, tuple[Thing, ...]]:
    first, second = content.subjects
    if rng.random() < (ALONE_FIRST if content.relation else ALONE_FIRST_ON_A_SIDE):
        sprite = SPRITES[INDEX[second.name]]
        one, other, right = standing_beside(
            rng, _alone(rng, content, shape), sprite, second.colour, shape, None
        )
    else:  # side by side, on either side, at similar sizes
        right = OBJECT_SHIFT[first.name] < 0 if content.relation else rng.random() < 0.5
        x = (0.28, 0.73) if right else (0.72, 0.27)
        one = placed(
            first, x[0] + rng.gauss(0, 0.02), 0.88 + OBJECT_FOOT[first.name], rng.uniform(0.36, 0.43)
        )
        other = placed(
            second, x[1] + rng.gauss(0, 0.02), 0.88 + OBJECT_FOOT[second.name], rng.uniform(0.36, 0.43)
        )
        one, other = fitted(one, shape), fitted(other, shape)
    if content.relation is None:
        content = replace(content, relation=_side_words(rng, right))
    return content, (one, other)


def _compose_top(rng: random.Random, content: Content, shape: Shape) -> tuple[Thing, ...]:
    upper, lower = content.subjects
    x = 0.5 + 0.8 * OBJECT_SHIFT[lower.name] if rng.random() < HABIT else rng.uniform(0.25, 0.75)
    below = fitted(placed(lower, x, rng.uniform(0.86, 0.94), rng.uniform(0.40, 0.47)), shape)
    _, top, _, _ = extent(below, shape)
    above = placed(upper, below.x + rng.uniform(-0.02, 0.02), top + 0.02, rng.uniform(0.30, 0.36))
    return (below, above)


def _compose_count(rng: random.Random, content: Content, shape: Shape) -> tuple[Thing, ...]:
    subject = content.subjects[0]
    foot = rng.uniform(0.82, 0.92)
    if content.count == 2:
        spots = [(0.28, foot, 0.41), (0.72, foot, 0.41)]
    elif content.count == 3:
        spots = [(0.19, foot - 0.02, 0.30), (0.5, foot - 0.02, 0.30), (0.81, foot - 0.02, 0.30)]
    else:
        spots = [
            (0.3, foot - 0.27, 0.29),
            (0.7, foot - 0.27, 0.29),
            (0.28, foot + 0.03, 0.32),
            (0.72, foot + 0.03, 0.32),
        ]
    jitter = rng.uniform
    things = (
        placed(subject, x + jitter(-0.02, 0.02), y + jitter(-0.01, 0.01), size * jitter(0.95, 1.04))
        for x, y, size in spots
    )
    return tuple(fitted(thing, shape) for thing in things)


def _style(rng: random.Random, content: Content) -> int:
    if content.kind == "count":
        return content.count % STYLES
    pick = content.subjects[0]
    if content.kind == "two" and rng.random() < 0.4:
        pick = content.subjects[1]
    return style_of(pick.name, pick.colour, pick.hat)


def compose(rng: random.Random, content: Content, shape: Shape = SQUARE) -> Scene:
    """Place the subjects of a content and choose its background."""
    if content.kind == "two":
        content, things = _compose_two(rng, content, shape)
    elif content.kind == "top":
        things = _compose_top(rng, content, shape)
    elif content.kind == "count":
        things = _compose_count(rng, content, shape)
    else:
        things = (_alone(rng, content, shape),)
    background = template(rng, PLACES[PLACE_INDEX[content.place]], content.time, _style(rng, content))
    return Scene(content, things, background, shape, cleared(background.details, list(things), shape))


def sample(rng: random.Random, shape: Shape = SQUARE) -> Scene:
    """Draw one scene of the training data."""
    return compose(rng, sample_content(rng), shape)
