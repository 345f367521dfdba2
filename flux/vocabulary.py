"""The words that a small model was trained on. Other words in a prompt are reported."""

import difflib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from flux.errors import warn


@cache
def known_words(file: Path) -> frozenset[str]:
    """Return the words of a vocabulary file, which has one word per line, in lower case."""
    return frozenset(file.read_text(encoding="utf-8").split())


def unknown_words(prompt: str, file: Path) -> dict[str, list[str]]:
    """Return the words of `prompt` that the vocabulary lacks, each with up to three similar words it has."""
    known = known_words(file)
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    return {word: difflib.get_close_matches(word, known, n=3) for word in words if word not in known}


def vocabulary_warnings(prompts: Iterable[str], file: Path) -> list[str]:
    """Return one sentence for each prompt with words that the model will ignore."""
    lines = []
    for prompt in prompts:
        unknown = [
            repr(word) + (f" (near: {', '.join(near)})" if near else "")
            for word, near in unknown_words(prompt, file).items()
        ]
        if unknown:
            lines.append(
                f"This model does not know {', '.join(unknown)} in {prompt!r} and will overlook it: "
                f"its words are listed in {file.name} beside its weights"
            )
    return lines


def warn_of_unknown_words(prompts: Iterable[str], file: Path) -> None:
    """Issue each of the `vocabulary_warnings`."""
    for line in vocabulary_warnings(prompts, file):
        warn(line)
