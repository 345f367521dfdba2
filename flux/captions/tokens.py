"""The length of texts in tokens of FLUX.1's text encoders, beyond which they are cut."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux.specs import get_spec
from flux.weights.find import ENV_TEXT, path_from_env
from flux.weights.hub import own_text_folder
from flux.weights.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEV, SCHNELL = get_spec("flux-dev"), get_spec("flux-schnell")
LIMITS = {"CLIP": DEV.clip_length, "T5": DEV.text_length}
"""The tokens that each encoder reads, its marks of beginning and end included."""
FOLDERS = {"CLIP": "tokenizer", "T5": "tokenizer_2"}
NAMED_AT_MOST = 5  # files in a line


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens as FLUX.1's text encoders do.

    Attributes:
        tokenizers: The tokenizer of each encoder.
    """

    tokenizers: Mapping[str, "PreTrainedTokenizerBase"]

    @classmethod
    def load(cls, folder: str | None = None) -> "TokenCounter":
        """Load both tokenizers.

        Args:
            folder: The folder of both. If None, the one that the environment names, or that of any model in
                the hub's cache. If there is none, schnell's are downloaded: they need no login.

        Raises:
            InputError: A tokenizer is not there, damaged, or cannot be downloaded.
        """
        named = folder or path_from_env(ENV_TEXT)
        found = Path(named) if named else own_text_folder(SCHNELL, download=True, weights=False)
        return cls({name: load_tokenizer(found / own, own, sys.maxsize) for name, own in FOLDERS.items()})

    def lengths(self, texts: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Return the tokens of each text, by encoder and by the text's name."""
        return {
            encoder: {name: len(tokenizer(text, verbose=False)["input_ids"]) for name, text in texts.items()}
            for encoder, tokenizer in self.tokenizers.items()
        }

    def report(self, texts: Mapping[str, str]) -> list[str]:
        """Return a line for each encoder: the longest text, and those beyond its limit.

        Args:
            texts: The texts by the names of their images.
        """
        lines = []
        for encoder, lengths in self.lengths(texts).items():
            limit = LIMITS[encoder]
            longest = max(lengths, key=lambda name: lengths[name])
            line = f"{encoder}: at most {lengths[longest]} tokens ({longest}), of {limit} that it reads"
            beyond = [name for name, length in lengths.items() if length > limit]
            if beyond:
                more = ", ..." if len(beyond) > NAMED_AT_MOST else ""
                line += f"; {len(beyond)} are cut: {', '.join(beyond[:NAMED_AT_MOST])}{more}"
            lines.append(line)
        return lines
