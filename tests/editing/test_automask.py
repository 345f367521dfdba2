"""Automatic masks, on maps and on attention made by hand."""

import warnings
from types import SimpleNamespace

import torch
from torch.testing import assert_close

from flux.attention.tokens import text_tokens
from flux.editing.automask import (
    WatchedPass,
    changes_whole_image,
    dilated_mask,
    subject_tokens,
    word_attention,
    words_only_in,
)
from flux.loaded_model import LoadedModel
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings

SIDE = 16


def square(share: float) -> torch.Tensor:
    """A map that is 0.05 but for a square of 1 in the middle that fills such a share of the picture."""
    image = torch.full((SIDE, SIDE), 0.05)
    rest = round(SIDE * (1 - share**0.5) / 2)
    image[rest : SIDE - rest, rest : SIDE - rest] = 1.0
    return image.reshape(1, -1)


def test_a_part_and_the_whole():
    """In rows of one batch, however strong the difference is, and if only both maps say so."""
    whole, scales, size = square(1.0), (0.01, 1, 50), (16 * SIDE, 16 * SIDE)
    maps = torch.cat([scale * square(share) for share in (0.1, 0.3, 0.5, 1.0) for scale in scales])
    for changed, apart in ((maps, maps), (whole.expand(12, -1), maps), (maps, whole.expand(12, -1))):
        assert changes_whole_image(changed, apart, *size).tolist() == [False] * 9 + [True] * 3


def test_the_edge_decides():
    """A subject that fills most of the picture, and stays, makes another place no part of it."""
    around = 1.05 - square(0.6)
    assert around.mean() < 0.5
    assert changes_whole_image(around, around, 16 * SIDE, 16 * SIDE).all()


def test_the_part_and_its_neighbours():
    """A square of four tokens: means round its corners off, neighbours add a rim."""
    [found] = dilated_mask(square(0.07), 16 * SIDE, 16 * SIDE).reshape(-1, SIDE, SIDE)
    rim = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    rim[5:11, 5:11] = True
    for row in (5, 10):
        for column in (5, 10):
            rim[row, column] = False
    assert torch.equal(found, rim)


def test_a_few_large_values_are_no_measure():
    """One token that is led far apart does not make the rest of a picture small."""
    apart = square(1.0)
    apart[0, 100] = 30.0
    assert changes_whole_image(square(1.0), apart, 32 * SIDE, 8 * SIDE).all()


def test_the_subject_is_where_a_shared_word_is_looked_at():
    """A square of six tokens attends to "dog", all else to everything alike: articles count for nothing."""
    t5, prompt = LoadedModel.load(resolve(ModelSettings(device="cpu"))).t5, "a dog on the grass"
    tokens = text_tokens(t5, prompt)
    num_txt = len(tokens.padding)
    q, k = torch.zeros(2, 1, 1, num_txt + SIDE**2, 4)
    k[0, 0, :num_txt][tokens.words["dog"]] = 1.0
    q[0, 0, num_txt:].view(SIDE, SIDE, 4)[4:10, 4:10] = 5.0

    def found(other: str) -> torch.Tensor:
        watched = WatchedPass([prompt], {0: (q, k)})
        return subject_tokens(t5, watched, [other], 16 * SIDE, 16 * SIDE).reshape(SIDE, SIDE)

    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[4:10, 4:10] = True
    rim = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    rim[3:11, 3:11] = True
    subject = found("a dog in the snow")
    assert subject[inside].all()
    assert not subject[~rim].any()
    assert not found("cats").any(), "no word is shared"
    # The tokens of a condition, whose keys come last, take a part of the attention.
    k = torch.cat((k, torch.zeros(1, 1, 9, 4)), dim=2)
    assert torch.equal(found("a dog in the snow"), subject)

    with warnings.catch_warnings(action="error"):
        watched = WatchedPass([prompt], {0: (q[:, :, : num_txt + 1], k[:, :, : num_txt + 1])})
        assert not subject_tokens(t5, watched, ["a dog"], 16, 16).any(), "one token is no place"


def test_words_that_only_one_prompt_has():
    source, edit = "A dog on the grass", "a dog wearing a top hat on the snow"
    assert words_only_in(edit, source) == ["wearing", "top", "hat", "snow"]
    assert words_only_in(source, edit) == ["grass"]


def test_tokens_that_attend_most_and_their_neighbours():
    """Each row by its own most; one that is 0 all over says nothing."""
    maps = torch.full((2, 48), 0.1)
    maps[0, [8, 9, 16, 17, 0, 1]] = 1.0
    maps[1] = 0.0
    found, nothing = dilated_mask(maps, 128, 96).reshape(2, 6, 8)
    assert found[:3, :3].all()
    assert not found[:, 5:].any()
    assert not found[5].any()
    assert nothing.all()


def test_attention_to_words_is_what_the_mask_follows():
    """By hand: in the first half of the picture image tokens attend to the third word, in the rest not. Rows
    go by their own prompts; one without a word of its own is 0.
    """
    tokenizer = SimpleNamespace(max_length=4)
    offsets = {"offset_mapping": [(0, 1), (2, 5), (6, 9), (0, 0)], "attention_mask": [1, 1, 1, 1]}
    tokenizer.tokenizer = lambda *given, **more: offsets
    q, k = torch.zeros(2, 1, 12, 2), torch.zeros(2, 1, 12 + 3, 2)  # three tokens of a condition
    k[:, 0, 2, 0], q[:, 0, 4:8, 0] = 5.0, 5.0
    watched = WatchedPass(["a dog cat"] * 2, {0: (q, k)})
    found, nothing = word_attention(tokenizer, watched, ["a dog", "cat dog a"])
    assert_close(found[:4], torch.ones(4))
    assert (found[4:] < 0.2).all()
    assert not nothing.any()
