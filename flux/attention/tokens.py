"""The words of a prompt, and the text tokens that each is made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.errors import InputError
from flux.modules.conditioner import HFEmbedder


def prompt_words(prompt: str) -> list[str]:
    """The prompt's words in order, each once, whether written large or small."""
    words = {}
    for word in re.findall(r"\w+(?:[-'’]\w+)*", prompt):
        words.setdefault(word.casefold(), word)
    return list(words.values())


def find_word(prompt: str, word: str) -> list[tuple[int, int]]:
    """Where the prompt says this word, or run of words ("top hat"): start and end of each place in it.

    Large and small letters count as equal. Raises InputError if the prompt does not say it.
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
    """What the T tokens of a prompt stand for.

    Attributes:
        padding: which ones fill the prompt up to the encoder's length, "T", bool. FLUX masks nothing, so they
            are attended to as well. The end-of-text token is not among them.
        words: which ones each chosen word is made of, "T", bool. A token that spans more than the word, as an
            unknown token may, counts as the word's.
    """

    padding: Tensor
    words: dict[str, Tensor]


def text_tokens(t5: HFEmbedder, prompt: str, words: Sequence[str] = ()) -> TextTokens:
    """The prompt's tokens as `t5` makes them. No words: every word of the prompt that was not cut off.

    Raises InputError for a word that the prompt does not say, or that lies behind the encoder's length.
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
