"""The words of a prompt, and the text tokens of each word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules.conditioner import HFEmbedder


def prompt_words(prompt: str) -> list[str]:
    """List the prompt's words in order, each once, regardless of case."""
    words = {}
    for word in re.findall(r"\w+(?:[-'’]\w+)*", prompt):
        words.setdefault(word.casefold(), word)
    return list(words.values())


def find_word(prompt: str, word: str) -> list[tuple[int, int]]:
    """Find a word, or a run of words ("top hat"), in the prompt, regardless of case.

    Returns:
        Start and end of each occurrence.

    Raises:
        InputError: The prompt does not contain it.
    """
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
    if places := [match.span() for match in found]:
        return places
    raise InputError(
        f"Got the word {word!r}, which is not in the prompt {prompt!r}: "
        f"give some of {', '.join(prompt_words(prompt)) or 'its words, but it has none'}"
    )


@dataclass(frozen=True, eq=False)
class TextTokens:
    """The meaning of the T text tokens of a prompt, as masks "T" of booleans.

    Attributes:
        padding: The tokens that fill the prompt up to the encoder's length, without the end-of-text token.
            FLUX masks nothing, so these are attended to as well.
        words: The tokens of each chosen word. A token that spans more than the word, as an unknown token may,
            belongs to the word.
    """

    padding: Tensor
    words: dict[str, Tensor]


def text_tokens(t5: HFEmbedder, prompt: str, words: Sequence[str] = ()) -> TextTokens:
    """Find the tokens of words among the prompt's tokens.

    Args:
        t5: The text encoder, whose tokenizer divides the prompt.
        prompt: The whole prompt.
        words: The words to find. If empty, every word of the prompt that is not cut off.

    Raises:
        InputError: The prompt does not contain a word, or the word lies beyond the encoder's length.
    """
    tokens = t5.tokenizer(
        prompt,
        truncation=True,
        max_length=t5.max_length,
        padding="max_length",
        return_offsets_mapping=True,
    )
    # Some tokenizers count the blank before a word as part of its token: hence overlap, not equality.
    begin, end = torch.tensor(tokens["offset_mapping"]).unbind(dim=-1)
    members = {}
    for word in words or prompt_words(prompt):
        mask = torch.zeros_like(begin, dtype=torch.bool)
        for start, stop in find_word(prompt, word):
            mask |= torch.maximum(begin, torch.tensor(start)) < torch.minimum(end, torch.tensor(stop))
        if mask.any():
            members[word] = mask
        elif words:
            raise InputError(
                f"Got the word {word!r}, which lies behind the prompt's first {t5.max_length} tokens: "
                "the model does not see it, shorten the prompt"
            )
    return TextTokens(torch.tensor(tokens["attention_mask"]) == 0, members)
