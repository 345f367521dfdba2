"""Tokenizers: one token for a known word, letters for an unknown one, loaded as the real ones are."""

import random

import pytest

from training.loop.data import CaptionEncoder
from training.scenes.compose import sample
from training.scenes.vocabulary import all_words
from training.stages.tokenizers import T5_LENGTH, write_tokenizers


@pytest.fixture(scope="module")
def encoder(tokenizers):
    return CaptionEncoder(tokenizers)


def test_known_words_are_one_token_each(encoder):
    words = [word for word in all_words() if word.isalpha()]
    assert [word for word in words if len(encoder.t5(word).input_ids) != 2] == []
    assert [word for word in words if len(encoder.clip(word).input_ids) != 3] == []


def test_case_does_not_matter(encoder):
    for tokenizer in (encoder.t5, encoder.clip):
        assert tokenizer("A Dog ON the Grass").input_ids == tokenizer("a dog on the grass").input_ids


def test_unknown_words_are_spelled(encoder):
    ids = encoder.t5("a zorblax").input_ids
    assert encoder.t5.unk_token_id not in ids
    assert len(ids) > 5
    assert encoder.t5.decode(ids, skip_special_tokens=True) == "a zorblax"


def test_captions_fit(encoder):
    longest = max(len(encoder.t5(sample(random.Random(seed)).caption).input_ids) for seed in range(300))
    assert longest <= T5_LENGTH


def test_they_come_out_the_same_again(tokenizers, tmp_path):
    write_tokenizers(tmp_path)
    for path in tokenizers.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(tokenizers)).read_bytes(), path.name
