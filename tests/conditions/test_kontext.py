"""Sizes of context images, and the positions of their tokens."""

import pytest
import torch
from helpers.conditions import draw
from PIL import Image

from flux.conditions.kontext import (
    PREFERED_KONTEXT_RESOLUTIONS,
    aspect_ratio_to_height_width,
    context_ids,
    kontext_condition,
    kontext_size,
    prepare_kontext,
)
from flux.errors import InputError
from flux.images.io import to_tensor


def test_seventeen_sizes():
    """Whole tokens, about a million pixels each, and each upright size lying down too."""
    sizes = PREFERED_KONTEXT_RESOLUTIONS
    assert len(set(sizes)) == 17
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert all(w % 16 == 0 == h % 16 and 4042 <= w * h // 256 <= 4150 for w, h in sizes)
    assert list(sizes) == sorted(sizes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((500, 500), (1024, 1024)), ((4000, 3000), (1184, 880)), ((10, 100), (672, 1568)), ((720, 1456),) * 2],
)
def test_the_nearest_shape(size, expected):
    assert kontext_size(*size) == expected


def test_models_of_another_size():
    assert kontext_size(4000, 3000, side=256) == (288, 224)
    assert kontext_size(10, 100, side=256) == (160, 384)


@pytest.mark.parametrize(
    ("ratio", "expected"), [("1:1", (1024, 1024)), ("16:9", (1360, 768)), ("2.5:1", (1616, 640))]
)
def test_a_ratio_as_width_and_height(ratio, expected):
    assert aspect_ratio_to_height_width(ratio) == expected


@pytest.mark.parametrize("ratio", ["16", "a:b", "1:0", "0:1", "-1:2", "1:2:3", "inf:1", "nan:1", "1000000:1"])
def test_what_is_no_ratio(ratio):
    with pytest.raises(InputError, match="aspect ratio"):
        aspect_ratio_to_height_width(ratio)


def test_positions_by_index():
    ids = context_ids([(32, 16), (16, 48)])
    assert ids.tolist() == [[[1, 0, 0], [1, 0, 1], [2, 0, 0], [2, 1, 0], [2, 2, 0]]]


def test_positions_by_offset():
    """The second is put below the wide first one, the third on the right of both."""
    ids = context_ids([(48, 16), (32, 32), (16, 16)], "offset")
    first, second, third = ids[0].split((3, 4, 1))
    assert first.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2]]
    assert second.tolist() == [[1, 1, 0], [1, 1, 1], [1, 2, 0], [1, 2, 1]]
    assert third.tolist() == [[1, 3, 0]]
    assert context_ids([(16, 48), (16, 16)], "offset")[0, -1].tolist() == [1, 0, 1]


def test_several_images_in_a_row(encode):
    images = [draw(100, 60), draw(60, 100, seed=1)]
    condition = kontext_condition(encode, images, side=128, strength=1.5)
    sizes = [kontext_size(*image.size, 128) for image in images]
    each = [
        encode(to_tensor(image.resize(size, Image.Resampling.LANCZOS))[None])
        for image, size in zip(images, sizes)
    ]
    assert torch.equal(condition.context, torch.cat(each, dim=1))
    assert torch.equal(condition.context_ids, context_ids(sizes))
    assert condition.context_strength == 1.5


def test_upstreams_call_takes_the_size_of_the_context(texts, image, monkeypatch):
    """The autoencoder is a stand-in: sizes are those of the published model."""
    from flux.conditions import kontext

    monkeypatch.setattr(kontext, "encoding", lambda ae: ae)

    def stand_in(pixels):
        height, width = pixels.shape[-2:]
        return torch.zeros(1, height * width // 256, 64)

    given, height, width = prepare_kontext(texts.t5, texts.clip, "", stand_in, image, 0, "cpu", bs=2)
    assert (width, height) == kontext_size(96, 64) == (1248, 832)
    assert given["img"].shape == given["img_cond_seq"].shape == (2, 52 * 78, 64)
    assert given["img_cond_seq_ids"].shape == (2, 52 * 78, 3)
    assert given["img_cond_seq_ids"].dtype == torch.float32
    _, height, width = prepare_kontext(texts.t5, texts.clip, "", stand_in, image, 0, "cpu", target_width=64)
    assert (width, height) == (64, 832)


def test_no_image_and_no_strength(encode, image):
    for images in ([], ["gone.png"], [None]):
        with pytest.raises(InputError, match=r"an empty list|gone\.png, which is not there|Got NoneType"):
            kontext_condition(encode, images)
    with pytest.raises(InputError, match="strength -1 of a condition"):
        kontext_condition(encode, image, strength=-1)
