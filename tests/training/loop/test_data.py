"""Training data."""

import random

import pytest
import torch

from flux.sampling import image_ids
from training.loop.data import CaptionEncoder, positions
from training.scenes.compose import sample
from training.stages.tokenizers import CLIP_LENGTH, T5_LENGTH


@pytest.fixture(scope="module")
def encoder(tokenizers):
    return CaptionEncoder(tokenizers)


def test_remembered_words_give_the_same_ids(encoder):
    """The training data is encoded word by word; what users type is encoded whole."""
    padded = {"padding": "max_length", "truncation": True}
    for caption in [
        "",
        "a dog, on the grass",
        "qwertyuiop asdfghjkl " * 9,
        *(sample(random.Random(n)).caption for n in range(99)),
    ]:
        t5, clip = encoder(caption)
        assert t5 == encoder.t5(caption, max_length=T5_LENGTH, **padded).input_ids
        assert clip == encoder.clip(caption, max_length=CLIP_LENGTH, **padded).input_ids


def test_small_images_use_the_large_ones_positions():
    device = torch.device("cpu")
    torch.testing.assert_close(positions(64, 64, device), image_ids(1, 64, 64, device))
    small = positions(32, 32, device, like=(64, 64))
    assert small[0, :, 1].unique().tolist() == [0.5, 2.5]
