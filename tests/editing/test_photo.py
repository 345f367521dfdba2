"""Photographs of any size there and back, masks in tokens, captions, automatic masks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flux.editing import automask
from flux.editing.caption import describe
from flux.editing.photo import Photograph, mask_image, middle, natural_size, token_mask
from flux.errors import InputError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((256, 256), (256, 256)),
        ((4000, 3000), (288, 224)),
        ((30, 40), (224, 288)),
        ((1920, 1080), (336, 192)),
        ((20, 4000), (16, 3616)),
    ],
)
def test_natural_size(size, expected):
    """The photograph's shape in the area of 256x256, sides in whole tokens, at least one."""
    assert natural_size(Image.new("RGB", size), 256) == expected


@pytest.mark.parametrize(
    ("size", "shape", "box"),
    [
        ((400, 200), (64, 64), (100, 0, 300, 200)),
        ((200, 401), (64, 32), (0, 150, 200, 250)),
        ((128, 64), (128, 64), (0, 0, 128, 64)),
        ((17, 400), (256, 16), (0, 199, 17, 200)),
    ],
)
def test_the_middle(size, shape, box):
    assert middle(size, *shape) == box


def test_a_photograph_there_and_back():
    """Its middle in the edit's size; put back, the rest is untouched to the last bit."""
    whole = noise(90, 50)
    photo = Photograph.of(whole, 32, 32)
    assert photo.box == (20, 0, 70, 50)
    assert photo.part.size == (32, 32)
    assert photo.part == whole.crop(photo.box).resize((32, 32), Image.Resampling.LANCZOS)
    back = photo.with_part(Image.new("RGB", (32, 32), "red"))
    assert back.size == whole.size
    assert back.crop(photo.box) == Image.new("RGB", (50, 50), "red")
    for rest in ((0, 0, 20, 50), (70, 0, 90, 50)):
        assert back.crop(rest) == whole.crop(rest)


@pytest.mark.parametrize("size", [(90, 50), (32, 32)], ids=["the whole's", "the edit's"])
def test_a_mask_keeps_the_original_pixels(size):
    photo = Photograph.of(noise(90, 50), 32, 32)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0], size[1] // 2))
    back = photo.with_part(Image.new("RGB", (32, 32), "red"), mask)
    assert back.crop((20, 30, 70, 50)) == photo.whole.crop((20, 30, 70, 50))
    assert back.crop((20, 0, 70, 20)) == Image.new("RGB", (50, 20), "red")


@pytest.mark.parametrize("size", [(1, 1), (15, 400), (400, 15)])
def test_photographs_of_less_than_a_token(size):
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels: expected at least 16"):
        Photograph.of(Image.new("RGB", size), 64, 64)


# ---- masks


def test_tokens_with_any_white_may_change():
    """One pixel is enough; greys count as the nearer of black and white."""
    mask = Image.new("RGB", (64, 32))
    mask.putpixel((17, 31), (255, 255, 255))
    mask.paste((120, 120, 120), (32, 0, 48, 16))
    mask.paste((140, 140, 140), (48, 0, 64, 16))
    found = token_mask(mask, [(64, 32)], 64, 32)
    assert found.shape == (1, 8, 1)
    assert found.dtype == torch.bool
    assert found.flatten().tolist() == [False, False, False, True, False, True, False, False]


def test_a_mask_is_cut_as_its_photograph():
    mask = Image.new("L", (400, 200))
    mask.paste(255, (0, 0, 200, 200))
    found = token_mask(mask, [(400, 200), (64, 64)], 64, 64)
    assert found.reshape(4, 4).tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (64, 64)), "black all over"),
        (Image.new("L", (65, 64), 255), "65x64 pixels: expected 64x64 or 400x200"),
    ],
)
def test_masks_that_cannot_be_used(mask, message):
    with pytest.raises(InputError, match=message):
        token_mask(mask, [(64, 64), (400, 200)], 64, 64)


def test_a_mask_with_white_only_where_the_photograph_is_cut_off():
    mask = Image.new("L", (400, 200))
    mask.paste(255, (0, 0, 90, 200))
    with pytest.raises(InputError, match="black all over"):
        token_mask(mask, [(400, 200)], 64, 64)


def test_a_mask_as_a_picture():
    tokens = torch.tensor([True, False, False, False])[:, None]
    picture = np.asarray(mask_image(tokens, 32, 32))
    assert picture.shape == (32, 32)
    assert picture[0, 0] == 255
    assert picture[31, 31] == 0
    assert 0 < picture[8, 16] < 255, "soft edges"


# ---- automatic masks


def test_words_that_only_one_prompt_has():
    source, edit = "A dog on the grass", "a dog wearing a top hat on the snow"
    assert automask.words_only_in(edit, source) == ["wearing", "top", "hat", "snow"]
    assert automask.words_only_in(source, edit) == ["grass"]


def test_tokens_that_attend_most_and_their_neighbours():
    """Each row by its own most; one that is 0 all over says nothing."""
    maps = torch.full((2, 48), 0.1)
    maps[0, [8, 9, 16, 17, 0, 1]] = 1.0
    maps[1] = 0.0
    found, nothing = automask.dilated_mask(maps, 128, 96).reshape(2, 6, 8)
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
    q, k = torch.zeros(2, 1, 12, 2), torch.zeros(2, 1, 12, 2)
    k[:, 0, 2, 0], q[:, 0, 4:8, 0] = 5.0, 5.0
    watched = automask.WatchedPass(["a dog cat"] * 2, {0: (q, k)})
    found, nothing = automask.word_attention(tokenizer, watched, ["a dog", "cat dog a"])
    assert_close(found[:4], torch.ones(4))
    assert (found[4:] < 0.2).all()
    assert not nothing.any()


# ---- captions


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A BLIP of a few thousand random weights, with its processor."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "on", "the", "grass"]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        "vocab_size": len(words),
        "bos_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    config = BlipConfig(
        text_config=small | ids | {"encoder_hidden_size": 16, "max_position_embeddings": 80},
        vision_config=small | {"image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def test_a_caption(captioner):
    words = describe(noise(50, 40), captioner).split()
    assert words
    assert set(words) <= {"a", "dog", "cat", "on", "the", "grass", "[UNK]", "[MASK]"}
    assert describe(noise(50, 40), captioner).split() == words


def test_captioners_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"caption_model '.*nothing'.*say in prompt") as error:
        describe(noise(50, 40), str(tmp_path / "nothing"))
    assert len(str(error.value).splitlines()) == 1
