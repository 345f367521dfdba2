"""Tokenizers on disk: whether a folder holds a whole one, of the right kind."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from flux.errors import InputError
from flux.weights.headers import parse_json, read_bytes, refuse_lfs_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The files of a vocabulary, by the tokenizer's folder in diffusers' layout. One group is enough.
VOCABULARIES = {
    "tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "tokenizer_2": (("tokenizer.json",), ("spiece.model",)),
}
# How the vocabulary of each encoder is called in tokenizer.json.
TOKENIZER_KINDS = {"tokenizer": ("BPE", "CLIP"), "tokenizer_2": ("Unigram", "T5")}


def vocabulary_files(folder: Path, name: str) -> list[Path]:
    """The files of a tokenizer's vocabulary that transformers reads; empty if there is no whole one.

    Args:
        folder: The tokenizer's folder.
        name: Its name in diffusers' layout: "tokenizer" is CLIP's, "tokenizer_2" T5's.
    """
    groups = ([folder / file for file in group] for group in VOCABULARIES[name])
    return next((group for group in groups if all(os.path.isfile(file) for file in group)), [])


def check_tokenizer(folder: Path, name: str) -> None:
    """Check the files of a tokenizer, without loading it. The arguments are those of `vocabulary_files`.

    Raises:
        InputError: The vocabulary is missing, damaged, or the other encoder's.
    """
    files = vocabulary_files(folder, name)
    if not files:
        wanted = " or ".join(" with ".join(group) for group in VOCABULARIES[name])
        raise InputError(
            f"Got {folder}, a tokenizer without its vocabulary ({wanted}): the download did not finish or "
            "it is another encoder's, fetch it again"
        )
    for file in [*files, *folder.glob("*config.json")]:
        data = read_bytes(file)
        refuse_lfs_pointer(file, data[:512])
        if not data.strip(b"\0"):
            raise InputError(f"Got {file}, which is empty: fetch it again")
        content = parse_json(data, file) if file.suffix == ".json" else {}
        if file.name == "tokenizer.json":
            _check_kind(folder, name, content.get("model"))


def _check_kind(folder: Path, name: str, model: object) -> None:
    if not isinstance(model, dict) or not model.get("vocab"):
        raise InputError(f"Got {folder / 'tokenizer.json'}, which has no vocabulary: fetch it again")
    for other, (kind, title) in TOKENIZER_KINDS.items():
        if other != name and model.get("type") == kind:
            raise InputError(
                f"Got {folder}, which is {title}'s tokenizer; "
                f"expected {TOKENIZER_KINDS[name][1]}'s: swap the folders"
            )


def load_tokenizer(folder: Path, name: str, vocabulary_size: int) -> "PreTrainedTokenizerBase":
    """Load a tokenizer.

    Args:
        folder: Its folder.
        name: As for `vocabulary_files`.
        vocabulary_size: How many tokens the encoder knows.

    Raises:
        InputError: As `check_tokenizer`, or it is another encoder's.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise InputError(f"Got {folder}, a tokenizer that cannot be loaded: fetch it again") from error
    if len(tokenizer) > vocabulary_size:
        raise InputError(
            f"Got {folder}, a tokenizer of {len(tokenizer)} tokens for an encoder of {vocabulary_size}: "
            "it is another encoder's"
        )
    return tokenizer
