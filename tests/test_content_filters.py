"""Content filters: a classifier of images, and a tiny Pixtral that says yes or no."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.studio import make_classifier
from PIL import Image

from flux.content_filters import ContentFilter, PixtralContentFilter
from flux.errors import InputError

WORDS = ["[UNK]", "[PAD]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "yes", "no", "dog", "a"]
WIDTH = 16


def save_pixtral(folder: Path, says: str) -> str:
    """Write a tiny Pixtral that gives every question the same answer, and return its folder."""
    import tokenizers
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessorPil,
        PixtralVisionConfig,
        PreTrainedTokenizerFast,
    )

    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]")
    base = tokenizers.Tokenizer(words)
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    specials = {"unk_token": "[UNK]", "pad_token": "[PAD]", "additional_special_tokens": WORDS[2:7]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **specials)
    tokenizer.save_pretrained(folder)
    sides = {"height": 16, "width": 16}
    PixtralImageProcessorPil(size={"longest_edge": 1024}, patch_size=sides).save_pretrained(folder)

    vision = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=1024,
    )
    text = MistralConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    features = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=WORDS.index("[IMG]"), **features
    )
    model = LlavaForConditionalGeneration(config)
    # The last token's embedding passes through alone, and the head answers to it.
    language = model.model.language_model
    for layer in language.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[WORDS.index(says)] = language.embed_tokens.weight[WORDS.index("[/INST]")]
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photo() -> Image.Image:
    ramp = np.linspace(0, 255, 96 * 80 * 3).reshape(96, 80, 3)
    return Image.fromarray(ramp.astype(np.uint8))


@pytest.fixture
def classifier(tmp_path):
    return partial(make_classifier, tmp_path / "classifier")


@pytest.fixture(scope="module")
def pixtrals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    return {says: save_pixtral(folder / says, says) for says in ("yes", "no")}


@pytest.mark.parametrize("says", ["yes", "no"])
def test_the_answer_decides(pixtrals, classifier, photo, says, tmp_path):
    """For prompts, and for images that the classifier lets pass, in every form that upstream's calls take."""
    checker = PixtralContentFilter(pixtral=pixtrals[says], nsfw=classifier(says=0))
    photo.save(tmp_path / "photo.png")
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1
    for image in (photo, str(tmp_path / "photo.png"), pixels, pixels[None]):
        assert checker.test_image(image) == (says == "yes")
    assert checker.test_txt("a dog") == (says == "yes")


def test_what_the_classifier_refuses_is_not_asked_about(pixtrals, classifier, photo):
    checker = PixtralContentFilter("cpu", 0.85, pixtral=pixtrals["no"], nsfw=classifier(says=1))
    assert checker.test_image(photo)
    assert not PixtralContentFilter("cpu", 1.1, pixtral=pixtrals["no"], nsfw=classifier(says=1)).test_image(
        photo
    )


def test_what_the_model_is_shown(pixtrals, classifier, monkeypatch):
    """Large images are scaled to the area of 512x512; the prompt stands in the question."""
    checker = PixtralContentFilter(pixtral=pixtrals["no"], nsfw=classifier(says=0))
    asked, answer = [], checker.model.forward
    monkeypatch.setattr(checker.model, "forward", lambda **given: asked.append(given) or answer(**given))
    checker.test_image(Image.new("RGB", (2048, 1024)))
    checker.test_image(Image.new("RGB", (160, 96)))
    checker.test_txt("a dog")
    assert [given["pixel_values"].shape[-2:] for given in asked[:2]] == [(368, 736), (96, 160)]
    tokens = asked[1]["input_ids"][0].tolist()
    image, pause, end = (WORDS.index(f"[{name}]") for name in ("IMG", "IMG_BREAK", "IMG_END"))
    assert tokens[1:67] == [*([*[image] * 10, pause] * 6)[:-1], end]
    assert tokens[0] == WORDS.index("[INST]")
    assert asked[2]["input_ids"][0, -3:].tolist() == [WORDS.index(word) for word in ("a", "dog", "[/INST]")]
    assert "pixel_values" not in asked[2]


def test_classifiers_that_are_no_content_filter(classifier, tmp_path):
    with pytest.raises(InputError, match="nsfw"):
        ContentFilter.load(classifier(labels=("cat", "dog")))
    with pytest.raises(InputError, match="content_filter"):
        ContentFilter.load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="for the content filter, which cannot be loaded"):
        PixtralContentFilter(pixtral=str(tmp_path / "nothing"), nsfw=classifier())
