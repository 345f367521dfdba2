"""The words of a prompt and their tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flux.attention.tokens import find_word, prompt_words, text_tokens
from flux.errors import InputError


def test_words_of_a_prompt():
    assert prompt_words("A dog, a cat's top-hat — and a Dog!") == ["A", "dog", "cat's", "top-hat", "and"]
    assert prompt_words("") == []


def test_words_are_found_whole():
    assert find_word("a dog and dogs, Dog", "dog") == [(2, 5), (16, 19)]
    assert find_word("a (top hat)", "top hat") == [(3, 10)]
    assert find_word("3.5 metres", "3.5") == [(0, 3)]


def test_unknown_words_name_those_there_are():
    with pytest.raises(InputError, match=r"'dogs', which is not in .*: give some of a, dog, on, the, grass$"):
        find_word("a dog on the grass", "dogs")
    with pytest.raises(InputError, match="it has none"):
        find_word("", "dog")


def test_tokens_of_the_small_model(nano):
    """A known word or a comma is a token, another word is spelled; then the end, and padding up to 40."""
    tokens = text_tokens(nano.t5, "A dog, a zyzzyva and a dog", ["a", "DOG", "zyzzyva"])
    assert tokens.padding.tolist() == [False] * 15 + [True] * 25
    assert {word: found.nonzero().flatten().tolist() for word, found in tokens.words.items()} == {
        "a": [0, 3, 12],
        "DOG": [1, 13],
        "zyzzyva": [4, 5, 6, 7, 8, 9, 10],
    }


def test_no_words_are_all_words(nano):
    tokens = text_tokens(nano.t5, "a dog and a cat")
    assert list(tokens.words) == ["a", "dog", "and", "cat"]
    assert text_tokens(nano.t5, "").words == {}


def test_words_that_were_cut_off(nano):
    prompt = "a dog " * 25 + "cat"
    assert list(text_tokens(nano.t5, prompt).words) == ["a", "dog"]
    with pytest.raises(InputError, match="'cat', which lies behind the prompt's first 40 tokens"):
        text_tokens(nano.t5, prompt, ["dog", "cat"])


class SentencePieces:
    """An embedder whose tokenizer cuts words into pieces and marks the blanks before them, as T5's does."""

    max_length = 12

    def __init__(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pieces = ["<pad>", "</s>", "<unk>", "▁a", "▁pen", "gu", "in", "▁in", "▁", "s", "now", ","]
        scores = [(piece, -1.0 - 0.1 * number) for number, piece in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_words_of_several_pieces():
    t5 = SentencePieces()
    prompt = "a penguin, in snow"
    pieces = t5.tokenizer.tokenize(prompt)
    assert pieces == ["▁a", "▁pen", "gu", "in", ",", "▁in", "▁", "s", "now"]
    tokens = text_tokens(t5, prompt, ["penguin", "in", "snow"])
    found = {word: [pieces[i] for i in places.nonzero()] for word, places in tokens.words.items()}
    assert found == {"penguin": ["▁pen", "gu", "in"], "in": ["▁in"], "snow": ["s", "now"]}
    assert tokens.padding.sum() == 3


# ---- properties


NAMES = st.sampled_from(["dog", "cat", "Dog", "top-hat", "zyzzyva", "a", "the", "penguin"])


@given(st.lists(NAMES, max_size=30))
def test_every_token_before_the_padding_is_a_words_or_the_end(nano, names):
    """In a prompt of words alone, each token belongs to the words that it spells, and to no padding."""
    tokens = text_tokens(nano.t5, " ".join(names))
    masks = [*tokens.words.values()]
    in_words = torch.stack([torch.zeros_like(tokens.padding), *masks]).any(dim=0)
    assert all(mask.any() for mask in masks)
    assert not (in_words & tokens.padding).any()
    assert (in_words | tokens.padding).logical_not().sum() == 1, "the end of the text"
    assert torch.stack([torch.zeros_like(tokens.padding), *masks]).sum(dim=0).max() <= 1


@given(st.lists(NAMES, min_size=1, max_size=12), st.sampled_from([" ", ", ", " (", "; "]))
def test_a_word_is_found_as_often_as_it_is_said(names, between):
    prompt = between.join(names)
    assert [word.casefold() for word in prompt_words(prompt)] == list(dict.fromkeys(map(str.casefold, names)))
    for name in names:
        places = find_word(prompt, name)
        said = [prompt[start:stop].casefold() for start, stop in places]
        assert said == [name.casefold()] * sum(other.casefold() == name.casefold() for other in names)
