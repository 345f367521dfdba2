"""Captions of photographs."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux.editing.caption import describe_image
from flux.errors import InputError


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
    words = describe_image(noise(50, 40), captioner).split()
    assert words
    assert set(words) <= {"a", "dog", "cat", "on", "the", "grass", "[UNK]", "[MASK]"}
    assert describe_image(noise(50, 40), captioner).split() == words


def test_captioners_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"caption_model '.*nothing'.*say in prompt") as error:
        describe_image(noise(50, 40), str(tmp_path / "nothing"))
    assert len(str(error.value).splitlines()) == 1
