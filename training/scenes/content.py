"""Draws what a scene shows and how its caption says it.

A `Content` fixes every choice of words, so that changing one thing leaves the other words alone.
"""

import random
from dataclasses import dataclass, replace

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

KINDS = {"one": 46, "two": 38, "top": 6, "count": 10}  # kinds of content, with their weights
HATTED, COLOURED = 0.42, 0.38  # shares of the subjects that can wear a hat or be recoloured


@dataclass(frozen=True)
class Subject:
    """An object as a caption speaks of it.

    Attributes:
        name: The object's name.
        word: The noun for it.
        colour: Its colour, if the caption gives one.
        size: "small" or "big", if the caption says so.
        size_word: The word for the size.
        hat: The hat that it wears, if any.
        wearing: The words for the hat.
    """

    name: str
    word: str
    colour: str | None = None
    size: str | None = None
    size_word: str = ""
    hat: str | None = None
    wearing: str = ""

    def phrase(self, many: bool = False) -> str:
        """Put the words for the object together, in the plural without a hat."""
        noun = plural(self.word) if many else self.word
        words = " ".join(part for part in (self.size_word, self.colour, noun) if part)
        return words if many else " ".join(part for part in (with_article(words), self.wearing) if part)


@dataclass(frozen=True)
class Content:
    """The content of a scene, with every choice of words made.

    Attributes:
        kind: "one", "two", "top" (the first on the second) or "count".
        subjects: One or two objects.
        place: The name of the place.
        place_words: The words for the place.
        time: The name of the time of day.
        time_words: The words for the time, or "".
        count: How many there are of the object, for "count".
        relation: The words that join two subjects. If None, the composition decides between left and right.
        plain_colour: The colour of a plain background.
        prefix: The words that the caption begins with.
        order: Where in the sentence place and time come, 0..4.
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
        """The caption."""
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


_WEIGHTS = [3.5 if sprite.common else 0.4 if sprite.hat else 1.0 for sprite in OBJECTS]
_ANIMALS = [sprite for sprite in OBJECTS if sprite.head]
_ANIMAL_WEIGHTS = [3.5 if sprite.common else 1.0 for sprite in _ANIMALS]
_PLACE_WEIGHTS = [place.weight for place in PLACES]


def draw_name(rng: random.Random, other_than: tuple[str, ...] = ()) -> str:
    while True:
        if rng.random() < 0.4:
            name = rng.choices(_ANIMALS, _ANIMAL_WEIGHTS)[0].name
        else:
            name = rng.choices(OBJECTS, _WEIGHTS)[0].name
        if name not in other_than:
            return name


def draw_word(rng: random.Random, name: str) -> str:
    words = SPRITES[INDEX[name]].words
    return words[0] if len(words) == 1 or rng.random() < 0.6 else rng.choice(words[1:])


def draw_subject(rng: random.Random, name: str) -> Subject:
    word = draw_word(rng, name)
    colour = None
    if SPRITES[INDEX[name]].recolourable and rng.random() < COLOURED:
        colour = rng.choice(COLOUR_NAMES)
    return Subject(name, word, colour)


def with_hat(rng: random.Random, subject: Subject, other_than: str | None = None) -> Subject:
    hat = rng.choice([name for name in HATS if name != other_than])
    worn = with_article(draw_word(rng, hat))
    words = rng.choice(("wearing {}", "wearing {}", "with {} on its head", "in {}")).format(worn)
    return replace(subject, hat=hat, wearing=words)


def draw_place(rng: random.Random, other_than: str | None = None) -> dict:
    place = rng.choices(PLACES, _PLACE_WEIGHTS)[0]
    while place.name == other_than:
        place = rng.choices(PLACES, _PLACE_WEIGHTS)[0]
    words, colour = rng.choice(place.phrases), None
    if place.name == "plain":
        colour = rng.choice(COLOUR_NAMES)
        words = words.format(colour).replace(" a orange", " an orange")
    return {"place": place.name, "place_words": words, "plain_colour": colour}


def draw_time(rng: random.Random, place: str, other_than: str | None = None) -> dict:
    if not PLACES[PLACE_INDEX[place]].outdoors:
        return {"time": "day", "time_words": ""}
    weights = [0 if name == other_than else weight for name, weight in zip(TIME_NAMES, (6, 2, 1.7))]
    time = rng.choices(TIME_NAMES, weights)[0]
    words = TIMES[time]
    return {"time": time, "time_words": rng.choice([w for w in words if w] if other_than else words)}


def _draw_relation(rng: random.Random) -> str | None:
    """Draw the words between two subjects. None is left or right, whichever the composition makes true."""
    return rng.choices((None, "and", "next to", "beside", "with"), (10, 5, 5, 3, 2))[0]


def sample_content(rng: random.Random, kind: str | None = None) -> Content:
    """Draw the content of a scene, at the rates of the training data."""
    kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
    # A hat on top of an animal would look like one that is worn.
    first = draw_subject(rng, draw_name(rng, other_than=tuple(HATS) if kind == "top" else ()))
    can_wear = SPRITES[INDEX[first.name]].head is not None
    place = draw_place(rng)
    content = Content(
        kind,
        (first,),
        **place,
        **draw_time(rng, place["place"]),
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
            first = with_hat(rng, first)
        return replace(content, subjects=(first,))
    second = draw_subject(rng, draw_name(rng, other_than=(first.name,)))
    if kind == "top":
        relation = rng.choice(("on top of", "standing on", "sitting on"))
    else:
        relation = _draw_relation(rng)
        if can_wear and rng.random() < HATTED / 2:
            first = with_hat(rng, first)
    return replace(content, subjects=(first, second), relation=relation)
