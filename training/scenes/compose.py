"""Captioned scenes: what a picture shows (`Content`), how it is said, where things stand (`Scene`).

A scene becomes one row of numbers, which `training.scenes.render` turns into a picture, thousands at a time.

    scene = sample(random.Random(0))
    print(scene.caption)
    pair = sample_pair(random.Random(0), "hat")      # the same scene before and after an edit
"""

import random
from dataclasses import dataclass, field, replace

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
from training.scenes.vocabulary import (
    COLOUR_NAMES,
    HATS,
    INDEX,
    NUMBERS,
    OBJECTS,
    PLACE_INDEX,
    PLACES,
    SIZES,
    SPRITES,
    TIME_NAMES,
    TIMES,
    plural,
    with_article,
)
from training.scenes.vocabulary import STYLES as PREFIXES

EDITS = ("replace", "hat", "add", "remove", "recolour", "background", "time")
KINDS = {"one": 46, "two": 38, "top": 6, "count": 10}
ALONE_FIRST = 0.85  # of the two-object scenes: the first stands as it would alone
ALONE_FIRST_ON_A_SIDE = 0.4  # where words say left or right, they must tell more than habits do
HATTED, COLOURED = 0.42, 0.38  # of those that can


@dataclass(frozen=True)
class Subject:
    """An object as a caption speaks of it: `word` is the noun used, `wearing` the words for the hat."""

    name: str
    word: str
    colour: str | None = None
    size: str | None = None
    size_word: str = ""
    hat: str | None = None
    wearing: str = ""

    def phrase(self, many: bool = False) -> str:
        noun = plural(self.word) if many else self.word
        words = " ".join(part for part in (self.size_word, self.colour, noun) if part)
        return words if many else " ".join(part for part in (with_article(words), self.wearing) if part)


@dataclass(frozen=True)
class Content:
    """What a picture shows, with every choice of words made, so that one change leaves the other words alone.

    `kind` is "one", "two", "top" (the first on the second) or "count". `relation` joins two subjects; None
    leaves left or right to the composition. `order` is where in the sentence place and time come.
    """

    kind: str
    subjects: tuple[Subject, ...]
    place: str
    place_words: str
    time: str
    time_words: str
    count: int = 1
    relation: str | None = ""
    plain_colour: str | None = None
    prefix: str = ""
    order: int = 0

    @property
    def caption(self) -> str:
        first = self.subjects[0]
        if self.kind == "count":
            body = f"{NUMBERS[self.count]} {first.phrase(many=True)}"
        elif self.kind == "one":
            body = first.phrase()
        else:
            body = f"{first.phrase()} {self.relation} {self.subjects[1].phrase()}"
        place, time = self.place_words, self.time_words
        late = f" {time}" if time else ""
        if self.prefix:
            return f"{self.prefix} {body} {place}{late}"
        if self.order == 1:
            return f"{place}, {body}{late}"
        if self.order == 2 and time:
            return f"{time}, {body} {place}"
        if self.order == 3:
            return f"there {'are' if self.kind == 'count' else 'is'} {body} {place}{late}"
        if self.order == 4:
            return f"{body}, {place}" + (f", {time}" if time else "")
        return f"{body} {place}{late}"


@dataclass(frozen=True)
class Scene:
    """A content with its composition: subjects back to front, the background's template, details
    kept clear.
    """

    content: Content
    things: tuple[Thing, ...]
    template: Template
    shape: Shape = SQUARE
    details: tuple[Thing, ...] = field(default=())

    @property
    def caption(self) -> str:
        return self.content.caption

    def row(self) -> list[float]:
        """The numbers the renderer reads, in the order of `COLUMNS`."""
        c, t = self.content, self.template
        plain = COLOUR_NAMES.index(c.plain_colour) if c.plain_colour else 0
        row = [PLACE_INDEX[c.place], TIME_NAMES.index(c.time), plain]
        row += [t.horizon, t.sun_x, t.sun_y, t.clouds, t.hills, t.phase, t.sky_tint, t.ground_tint]
        for slots, things in ((DETAIL_SLOTS, self.details), (THING_SLOTS, self.things)):
            for slot in range(slots):
                thing = things[slot] if slot < len(things) else NOTHING
                row += [thing.sprite, thing.x, thing.foot, thing.size, thing.colour, thing.hat]
        return row


DETAIL_SLOTS, THING_SLOTS, SLOT_WIDTH, HEADER = 3, 4, 6, 11
FIRST_DETAIL = HEADER
FIRST_THING = HEADER + DETAIL_SLOTS * SLOT_WIDTH
COLUMNS = FIRST_THING + THING_SLOTS * SLOT_WIDTH
NOTHING = Thing(-1, 0.0, 0.0, 1.0)

# ----- content

_WEIGHTS = [3.5 if sprite.common else 0.4 if sprite.hat else 1.0 for sprite in OBJECTS]
_ANIMALS = [sprite for sprite in OBJECTS if sprite.head]
_ANIMAL_WEIGHTS = [3.5 if sprite.common else 1.0 for sprite in _ANIMALS]
_PLACE_WEIGHTS = [place.weight for place in PLACES]


def _draw_name(rng: random.Random, other_than: tuple[str, ...] = ()) -> str:
    while True:
        if rng.random() < 0.4:
            name = rng.choices(_ANIMALS, _ANIMAL_WEIGHTS)[0].name
        else:
            name = rng.choices(OBJECTS, _WEIGHTS)[0].name
        if name not in other_than:
            return name


def _draw_word(rng: random.Random, name: str) -> str:
    words = SPRITES[INDEX[name]].words
    return words[0] if len(words) == 1 or rng.random() < 0.6 else rng.choice(words[1:])


def _draw_subject(rng: random.Random, name: str) -> Subject:
    word = _draw_word(rng, name)
    colour = None
    if SPRITES[INDEX[name]].recolourable and rng.random() < COLOURED:
        colour = rng.choice(COLOUR_NAMES)
    return Subject(name, word, colour)


def _with_hat(rng: random.Random, subject: Subject, other_than: str | None = None) -> Subject:
    hat = rng.choice([name for name in HATS if name != other_than])
    worn = with_article(_draw_word(rng, hat))
    words = rng.choice(("wearing {}", "wearing {}", "with {} on its head", "in {}")).format(worn)
    return replace(subject, hat=hat, wearing=words)


def _draw_place(rng: random.Random, other_than: str | None = None) -> dict:
    place = rng.choices(PLACES, _PLACE_WEIGHTS)[0]
    while place.name == other_than:
        place = rng.choices(PLACES, _PLACE_WEIGHTS)[0]
    words, colour = rng.choice(place.phrases), None
    if place.name == "plain":
        colour = rng.choice(COLOUR_NAMES)
        words = words.format(colour).replace(" a orange", " an orange")
    return {"place": place.name, "place_words": words, "plain_colour": colour}


def _draw_time(rng: random.Random, place: str, other_than: str | None = None) -> dict:
    if not PLACES[PLACE_INDEX[place]].outdoors:
        return {"time": "day", "time_words": ""}
    weights = [0 if name == other_than else weight for name, weight in zip(TIME_NAMES, (6, 2, 1.7))]
    time = rng.choices(TIME_NAMES, weights)[0]
    words = TIMES[time]
    return {"time": time, "time_words": rng.choice([w for w in words if w] if other_than else words)}


def _draw_relation(rng: random.Random) -> str | None:
    """None means left or right, whichever the composition makes true."""
    return rng.choices((None, "and", "next to", "beside", "with"), (10, 5, 5, 3, 2))[0]


def sample_content(rng: random.Random, kind: str | None = None) -> Content:
    """Something to show, at the training data's own rates."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    # A hat that stands on an animal is a hat that is worn.
    first = _draw_subject(rng, _draw_name(rng, other_than=tuple(HATS) if kind == "top" else ()))
    can_wear = SPRITES[INDEX[first.name]].head is not None
    place = _draw_place(rng)
    content = Content(
        kind,
        (first,),
        **place,
        **_draw_time(rng, place["place"]),
        prefix=rng.choice(PREFIXES) if rng.random() < 0.36 else "",
        order=rng.choices(range(5), (66, 10, 10, 8, 6))[0],
    )
    if kind == "count":
        return replace(content, count=rng.choices((2, 3, 4), (4, 4, 3))[0])
    if kind == "one":
        size = rng.choices((None, "small", "big"), (8.4, 0.8, 0.8))[0]
        if size:
            first = replace(first, size=size, size_word=rng.choice(SIZES[size]))
        if can_wear and rng.random() < HATTED:
            first = _with_hat(rng, first)
        return replace(content, subjects=(first,))
    second = _draw_subject(rng, _draw_name(rng, other_than=(first.name,)))
    if kind == "top":
        relation = rng.choice(("on top of", "standing on", "sitting on"))
    else:
        relation = _draw_relation(rng)
        if can_wear and rng.random() < HATTED / 2:
            first = _with_hat(rng, first)
    return replace(content, subjects=(first, second), relation=relation)


# ----- composition


def _alone(rng: random.Random, content: Content, shape: Shape) -> Thing:
    subject = content.subjects[0]
    sprite = SPRITES[INDEX[subject.name]]
    thing = standing_alone(
        rng, sprite, content.place, content.time, subject.colour, subject.hat, subject.size
    )
    return fitted(thing, shape)


def _thing(subject: Subject, x: float, foot: float, size: float) -> Thing:
    colour = COLOUR_NAMES.index(subject.colour) if subject.colour else -1
    return Thing(INDEX[subject.name], x, foot, size, colour, INDEX[subject.hat] if subject.hat else -1)


def _side_words(rng: random.Random, second_on_the_right: bool) -> str:
    """Where the first stands, seen from the second."""
    return rng.choice(("to the {} of", "on the {} of")).format("left" if second_on_the_right else "right")


def _compose_two(rng: random.Random, content: Content, shape: Shape) -> tuple[Content, tuple[Thing, ...]]:
    first, second = content.subjects
    if rng.random() < (ALONE_FIRST if content.relation else ALONE_FIRST_ON_A_SIDE):
        sprite = SPRITES[INDEX[second.name]]
        one, other, right = standing_beside(
            rng, _alone(rng, content, shape), sprite, second.colour, shape, None
        )
    else:  # side by side, on either side, at like sizes
        right = OBJECT_SHIFT[first.name] < 0 if content.relation else rng.random() < 0.5
        x = (0.28, 0.73) if right else (0.72, 0.27)
        one = _thing(
            first, x[0] + rng.gauss(0, 0.02), 0.88 + OBJECT_FOOT[first.name], rng.uniform(0.36, 0.43)
        )
        other = _thing(
            second, x[1] + rng.gauss(0, 0.02), 0.88 + OBJECT_FOOT[second.name], rng.uniform(0.36, 0.43)
        )
        one, other = fitted(one, shape), fitted(other, shape)
    if content.relation is None:
        content = replace(content, relation=_side_words(rng, right))
    return content, (one, other)


def _compose_top(rng: random.Random, content: Content, shape: Shape) -> tuple[Thing, ...]:
    upper, lower = content.subjects
    x = 0.5 + 0.8 * OBJECT_SHIFT[lower.name] if rng.random() < HABIT else rng.uniform(0.25, 0.75)
    below = fitted(_thing(lower, x, rng.uniform(0.86, 0.94), rng.uniform(0.40, 0.47)), shape)
    _, top, _, _ = extent(below, shape)
    above = _thing(upper, below.x + rng.uniform(-0.02, 0.02), top + 0.02, rng.uniform(0.30, 0.36))
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
        _thing(subject, x + jitter(-0.02, 0.02), y + jitter(-0.01, 0.01), size * jitter(0.95, 1.04))
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
    """Place a content's subjects and choose its background."""
    if content.kind == "two":
        content, things = _compose_two(rng, content, shape)
    elif content.kind == "top":
        things = _compose_top(rng, content, shape)
    elif content.kind == "count":
        things = _compose_count(rng, content, shape)
    else:
        things = (_alone(rng, content, shape),)
    look = template(rng, PLACES[PLACE_INDEX[content.place]], content.time, _style(rng, content))
    return Scene(content, things, look, shape, cleared(look.details, list(things), shape))


def sample(rng: random.Random, shape: Shape = SQUARE) -> Scene:
    """One scene of the training data."""
    return compose(rng, sample_content(rng), shape)


# ----- edits


def edited(rng: random.Random, content: Content, edit: str) -> Content:
    """The content of a single subject after an edit, all other words kept.

    Edits: "replace", "hat", "add", "recolour", "background", "time" ("remove" is "add" read backwards).
    Raises ValueError for an edit this content does not allow (a hat on a car, night on a table).
    """
    subject = content.subjects[0]
    sprite = SPRITES[INDEX[subject.name]]
    if edit == "replace":
        other = _draw_name(rng, other_than=(subject.name, *HATS))
        while subject.hat and SPRITES[INDEX[other]].head is None:
            other = _draw_name(rng, other_than=(subject.name, *HATS))
        colour = subject.colour if SPRITES[INDEX[other]].recolourable else None
        return replace(
            content, subjects=(replace(subject, name=other, word=_draw_word(rng, other), colour=colour),)
        )
    if edit == "hat" and sprite.head:
        return replace(content, subjects=(_with_hat(rng, subject, other_than=subject.hat),))
    if edit == "add":
        second = _draw_subject(rng, _draw_name(rng, other_than=(subject.name, *HATS)))
        relation = rng.choice(("and", "next to", "beside", "with"))
        return replace(content, kind="two", subjects=(subject, second), relation=relation)
    if edit == "recolour" and sprite.recolourable:
        colour = rng.choice([name for name in COLOUR_NAMES if name != subject.colour])
        return replace(content, subjects=(replace(subject, colour=colour),))
    if edit == "background":
        place = _draw_place(rng, other_than=content.place)
        time = {}
        if not PLACES[PLACE_INDEX[place["place"]]].outdoors:
            time = {"time": "day", "time_words": ""}
        return replace(content, **place, **time)
    if edit == "time" and PLACES[PLACE_INDEX[content.place]].outdoors:
        return replace(content, **_draw_time(rng, content.place, other_than=content.time))
    raise ValueError(f'Got the edit "{edit}" for "{content.caption}", which does not allow it')


def editable(rng: random.Random, edit: str) -> tuple[Content, Content]:
    """A random single-subject content and its edit."""
    while True:
        content = sample_content(rng, "one")
        try:
            return content, edited(rng, content, edit)
        except ValueError:
            continue


@dataclass(frozen=True)
class Pair:
    """The same scene before and after an edit. `changed` numbers the things that differ; empty: all but the
    things.
    """

    edit: str
    before: Scene
    after: Scene
    changed: tuple[int, ...]


def sample_pair(rng: random.Random, edit: str, shape: Shape = SQUARE) -> Pair:
    """A scene before and after an edit (one of `EDITS`): everything the edit does not name stays
    where it is.
    """
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
        things = (fitted(_thing(subject, thing.x, thing.foot, thing.size), shape),)
        if (
            edit == "hat"
        ):  # the wearer may have to move down to make room: then it does so before the edit too
            thing = replace(thing, x=things[0].x, foot=things[0].foot)
    else:
        changed = ()
    look = scene.template
    after_look = look
    if not changed:
        after_look = template(rng, PLACES[PLACE_INDEX[other.place]], other.time, style_of(subject.name))
    everything = [thing, *things]
    before = Scene(content, (thing,), look, shape, cleared(look.details, everything, shape))
    after = Scene(other, things, after_look, shape, cleared(after_look.details, everything, shape))
    if edit == "remove":
        before, after = after, before
    return Pair(edit, before, after, changed)
