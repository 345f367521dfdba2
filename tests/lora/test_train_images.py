"""The images of a training: their sizes, captions and order, and the noise that is mixed into them."""

import json
import shutil

import pytest
import torch
from helpers import lora_training
from helpers.lora_training import settings

from flux.lora.dataset import bucket, read_training_set
from flux.lora.step import noise_levels, noisy
from flux.specs import configs

pytestmark = pytest.mark.usefixtures("tiny_nano")


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (1024, 1024, 1024, (1024, 1024)),
        (4000, 3000, 1024, (1152, 832)),
        (3000, 4000, 512, (384, 576)),
        (300, 200, 1024, (256, 192)),
        (64, 64, 1024, (64, 64)),
        (4000, 100, 512, (3200, 64)),
    ],
)
def test_a_training_image_keeps_its_shape(width, height, size, expected):
    """About the area, in the image's proportions, and never larger than the image."""
    assert bucket(width, height, size) == expected
    assert expected[0] <= width
    assert expected[1] <= height


def test_captions_have_the_trigger(tmp_path):
    images = lora_training.write_images(tmp_path / "images")
    (images / "1.txt").write_text("a Flower Bell in the snow")
    (images / "2.txt").write_text("\ufeffa garden\n")
    (images / "3.txt").unlink()
    for name, file, text in (("4", "metadata", "a sunflower bell at night"), ("5", "captions", "at sunset")):
        shutil.copy(images / "3.png", images / f"{name}.png")
        (images / f"{file}.jsonl").write_text(json.dumps({"file_name": f"{name}.png", "text": text}))
    given = settings(tmp_path)
    with pytest.warns(match=r"1 of 6 images have no caption, such as 3\.png: the trigger stands alone"):
        captions = [example.caption for example in read_training_set(given, lora_training.SPEC).examples]
    assert captions == [
        "a flower bell on the grass", "a Flower Bell in the snow", "flower bell, a garden", "flower bell",
        "flower bell, a sunflower bell at night", "flower bell, at sunset",
    ]  # fmt: skip


def test_each_epoch_sees_each_example_once_in_batches_of_one_size(tmp_path):
    training = read_training_set(settings(tmp_path), lora_training.SPEC)
    orders = [training.batches(7, epoch, 2) for epoch in range(5)]
    for batches in orders:
        assert sorted(number for batch in batches for number in batch) == [0, 1, 2, 3]
        assert all(len({training.examples[number].size for number in batch}) == 1 for batch in batches)
    assert len({str(batches) for batches in orders}) > 1
    assert orders[3] == training.batches(7, 3, 2)
    assert {len(batches) for batches in orders} == {3}


def test_a_batch_size_beyond_the_images_of_one_size_is_told(tmp_path):
    """Three of the four have one size."""
    training = read_training_set(settings(tmp_path, batch_size=3), lora_training.SPEC)
    assert max(map(len, training.batches(0, 0, 9))) == 3
    with pytest.warns(match="Got batch_size 4, but at most 3 images of one size"):
        read_training_set(settings(tmp_path, batch_size=4), lora_training.SPEC)


def test_noise_levels_are_shifted_as_the_samplers():
    """By e^1.15 at 4096 tokens: the median of sigmoid(n), 1/2, becomes s / (s + 1)."""
    levels = noise_levels(torch.zeros(1), 4096, configs["flux-dev"], torch.float32)
    shift = 2.718281828459045**1.15
    assert levels.item() == pytest.approx(shift / (shift + 1), rel=1e-6)
    half = noise_levels(torch.randn(9), 4096, configs["flux-dev"], torch.bfloat16)
    assert torch.equal(half, half.bfloat16().float())


def test_noisy_latents():
    x, noise, t = torch.ones(2, 3, 4), torch.full((2, 3, 4), 5.0), torch.tensor([0.25, 1.0])
    assert torch.equal(noisy(x, noise, t)[:, 0, 0], torch.tensor([2.0, 5.0]))
