"""The words a small model was trained on, and which words of a prompt are not among them."""

import difflib
import re
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path


@cache
def known_words(file: Path) -> frozenset[str]:
    """The words of a vocabulary file, one a line, in lower case."""
    return frozenset(file.read_text(encoding="utf-8").split())


def unknown_words(prompt: str, file: Path) -> dict[str, list[str]]:
    """The words of `prompt` that are not in the vocabulary, in their order, each with up to three near ones
    that are.
    """
    known = known_words(file)
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    return {word: difflib.get_close_matches(word, known, n=3) for word in words if word not in known}


def overlooked(prompts: Iterable[str], file: Path) -> list[str]:
    """A line for each prompt with words that the model will overlook."""
    lines = []
    for prompt in prompts:
        named = [
            repr(word) + (f" (near: {', '.join(near)})" if near else "")
            for word, near in unknown_words(prompt, file).items()
        ]
        if named:
            lines.append(
                f"This model does not know {', '.join(named)} in {prompt!r} and will overlook it: "
                f"its words are listed in {file.name} beside its weights"
            )
    return lines


def warn_of_unknown_words(prompts: Iterable[str], file: Path) -> None:
    """A UserWarning for each line of `overlooked`."""
    for line in overlooked(prompts, file):
        warnings.warn(line, stacklevel=3)
