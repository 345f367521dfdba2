"""Says an edit as an instruction: "add a top hat", "make it night", "replace the dog with a cat"."""

import random
import re

from training.scenes.content import Subject, draw_word
from training.scenes.edits import Pair
from training.scenes.vocabulary import all_words, with_article

SENTENCES: dict[str, tuple[str, ...]] = {
    "replace": ("replace the {old} with {new}", "change the {old} to {new}", "turn the {old} into {new}"),
    "hat": ("add {hat}", "put {hat} on the {old}", "give the {old} {hat}"),
    "add": ("add {second} beside the {old}", "put {second} next to the {old}", "add {second}"),
    "remove": ("remove the {gone}", "take the {gone} away"),
    "recolour": ("make the {old} {colour}", "paint the {old} {colour}"),
    "background": ("change the background: {place}", "put the {old} {place}"),
    "time": ("make it {time}", "change the time to {time}"),
}
TIMES = {"day": ("day", "a sunny day"), "night": ("night", "a dark night"), "sunset": ("sunset", "evening")}
"""The words for a time after "make it"."""


def instruction(rng: random.Random, pair: Pair) -> str:
    """Say what changes from the scene before to the scene after.

    "The dog" is the subject's noun alone: what it wears and its colour are on the image.
    """
    before, after = pair.before.content, pair.after.content
    subject, second = after.subjects[0], max(before.subjects, after.subjects, key=len)[-1]
    words = {
        "old": before.subjects[0].word,
        "new": with_article(_colour_and_noun(subject)),
        "hat": with_article(draw_word(rng, subject.hat)) if subject.hat else "",
        "second": with_article(_colour_and_noun(second)),
        "gone": second.word,
        "colour": subject.colour,
        "place": after.place_words,
        "time": rng.choice(TIMES[after.time]),
    }
    return rng.choice(SENTENCES[pair.edit]).format(**words)


def instruction_words() -> list[str]:
    """List every word that an instruction can hold, sorted: those of captions too."""
    phrases = [phrase for sentences in (*SENTENCES.values(), *TIMES.values()) for phrase in sentences]
    words = {word for phrase in phrases for word in re.sub(r"\{\w+\}|:", "", phrase).split()}
    return sorted(words | set(all_words()))


def _colour_and_noun(subject: Subject) -> str:
    return " ".join(part for part in (subject.colour, subject.word) if part)
