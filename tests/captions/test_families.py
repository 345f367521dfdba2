"""Each family of captioners that the docs name, in its own classes of transformers."""

import json

import pytest
import torch
from helpers import captioner_families as families
from helpers.images import noise
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

from flux.captions.captioner import Captioner, ChatCaptioner, GitCaptioner, PlainCaptioner
from flux.errors import InputError

IMAGES = [noise(50, 40, 0), noise(20, 70, 1), noise(64, 64, 2)]
ASKED = "describe the grass"
LIMITS = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture
def without_videos(monkeypatch):
    """Processors that read videos too do without that part, which needs torchvision."""
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)


def build(family: str, folder) -> str:
    if family == "SmolVLM":
        pytest.importorskip("torchvision")
        pytest.importorskip("num2words")
    families.CHAT[family](folder)
    return str(folder)


def texts(captioner: Captioner, prompt: str | None = None, images=IMAGES) -> list[str]:
    return [each.text for each in captioner.describe(images, prompt, 8)]


@pytest.mark.parametrize("family", families.CHAT)
def test_chat_models_are_asked_as_the_library_asks_them(family, tmp_path, without_videos):
    """By its own template, tokenizer and images in one call, an image at a time."""
    name = build(family, tmp_path)
    captioner = Captioner.load(name)
    assert isinstance(captioner, ChatCaptioner)
    found = texts(captioner, ASKED)
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name).eval()
    for image, text in zip(IMAGES, found, strict=True):
        parts = [{"type": "image", "image": image}, {"type": "text", "text": ASKED}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, **LIMITS)[:, inputs["input_ids"].shape[1] :]
        assert text == processor.batch_decode(tokens, skip_special_tokens=True)[0]
    assert len(set(found)) > 1, "the images make a difference"
    assert texts(captioner, "a dog on it") != found, "the question makes a difference"


def test_blip_2_continues_a_prompt(tmp_path):
    families.blip2(tmp_path)
    captioner = Captioner.load(str(tmp_path))
    assert type(captioner) is PlainCaptioner
    found = texts(captioner)
    inputs = captioner.processor(images=IMAGES, return_tensors="pt")
    tokens = captioner.model.generate(**inputs, **LIMITS)
    assert found == captioner.processor.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(found)) > 1, "the images make a difference"
    assert all(text.startswith("the grass") for text in texts(captioner, "the grass"))


def test_git_continues_a_prompt(tmp_path):
    """Which ends with its last word: a mark of the end there would begin another text."""
    families.git(tmp_path)
    captioner = Captioner.load(str(tmp_path))
    assert isinstance(captioner, GitCaptioner)
    found = texts(captioner)
    inputs = captioner.processor(images=IMAGES, return_tensors="pt")
    tokens = captioner.model.generate(**inputs, **LIMITS)
    assert found == captioner.processor.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(found)) > 1, "the images make a difference"
    begun = torch.tensor([[2, *captioner.processor.tokenizer.convert_tokens_to_ids(["the", "grass"])]])
    tokens = captioner.model.generate(pixel_values=inputs["pixel_values"][:1], input_ids=begun, **LIMITS)
    expected = captioner.processor.batch_decode(tokens, skip_special_tokens=True)
    assert texts(captioner, "the grass", IMAGES[:1]) == expected


@pytest.mark.parametrize("family", ["Qwen3-VL", "Gemma3", "LLaVA-NeXT"])
def test_batches_change_no_words(family, tmp_path, without_videos):
    captioner = Captioner.load(build(family, tmp_path))
    assert texts(captioner) == [texts(captioner, images=[image])[0] for image in IMAGES]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError(
            "\nQwen2VLVideoProcessor requires the Torchvision library but it was not found in your "
            "environment. Check out the instructions on the\ninstallation page."
        )

    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", missing)
    with pytest.raises(InputError) as error:
        Captioner.load(build("Qwen2.5-VL", tmp_path))
    assert json.dumps(str(tmp_path))[1:-1] in str(error.value)
    assert str(error.value).endswith(
        "which needs a package that is not installed (Qwen2VLVideoProcessor requires the Torchvision library "
        "but it was not found in your environment): pip install torchvision num2words"
    )
