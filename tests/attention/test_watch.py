"""Sampling one image while its attention is watched."""

import pytest
import torch
from helpers.attention import DOG, settings

import flux.attention.watch as watch_room
from flux.attention.watch import check_watch, steps_to_watch, watch
from flux.errors import InputError


def test_watching_changes_no_step(nano):
    """The very steps of `generate`, the chosen ones looked at and nothing of them kept."""
    chosen = settings(at_steps=(2, 0), words=("dog",))
    expected = []
    nano.generate([DOG], [7], **chosen.sampling(), on_step=expected.append, progress=False)
    steps, seen = watch(nano, DOG, 7, chosen, progress=False)
    assert len(steps) == 4
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(steps, expected))
    assert not any(step.watched for step in steps)
    assert [(step.index, step.t) for step in seen] == [(0, expected[0].t), (2, expected[2].t)]
    for step in seen:
        assert list(step.layers) == [3, 12]
        for found in step.layers.values():
            assert found.text.shape == found.to_words["dog"].shape == found.from_words["dog"].shape == (1, 24)
            assert (found.padding < found.text).all()
            assert (found.to_words["dog"] < found.text).all()


def test_the_word_is_where_its_object_is(nano):
    """Seed 7 puts the dog on the left, below the middle, and layer 8 knows so at the first step."""
    one_step = settings(num_steps=1, width=256, height=256, layers=(8,))
    _, [first] = watch(nano, "a dog on the grass", 7, one_step, progress=False)
    words = first.layers[8].to_words
    row, column = divmod(int(words["dog"].argmax()), 16)
    assert 9 <= row <= 14
    assert 2 <= column <= 8
    assert words["dog"].max() > max(0.1, 5 * words["the"].max())


def test_nothing_is_watched_unasked(nano, monkeypatch):
    monkeypatch.setattr(watch_room, "layer_attention", lambda *_: pytest.fail("no layers were named"))
    steps, seen = watch(nano, DOG, 7, settings(layers=(), num_steps=2), progress=False)
    assert len(steps) == 2
    assert seen == []


def test_steps_to_watch():
    assert steps_to_watch(settings(num_steps=20)) == [0, 10, 19]
    assert steps_to_watch(settings(num_steps=1)) == [0]
    assert steps_to_watch(settings(num_steps=20, at_steps=(7, 3))) == [3, 7]
    with pytest.raises(InputError, match=r"Got at_steps \[4\], but the 4 steps are numbered 0..3"):
        steps_to_watch(settings(at_steps=(1, 4)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": (3, 15)}, r"layers \[15\].* 0..14"),
        ({"at_steps": (20,)}, r"at_steps \[20\]"),
        ({"words": ("dog", "cat")}, "the word 'cat', which is not in the prompt"),
    ],
)
def test_what_is_not_there_is_told_before_loading(wrong, message):
    check_watch(settings(at_steps=(3,), words=("dog", "top hat")))
    with pytest.raises(InputError, match=message):
        check_watch(settings(**wrong))
