"""Captioners of each kind, beside the library's own pipeline and by hand."""

import pytest
import torch
from helpers import captioners
from helpers.images import noise

from flux.captions.captioner import (
    PHOTO_PROMPT,
    Captioner,
    ChatCaptioner,
    PlainCaptioner,
    TaskCaptioner,
    describe_image,
)
from flux.errors import InputError

IMAGES = [noise(50, 40, 0), noise(20, 70, 1), noise(64, 64, 2)]


def one_line(text: str) -> str:
    return " ".join(text.split())


def library(model: str):
    from transformers import pipeline

    return pipeline("image-text-to-text", model=model, device="cpu")


def chat(image, prompt: str):
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def test_plain_captions_are_the_library_s(blip):
    captioner = Captioner.load(blip)
    assert isinstance(captioner, PlainCaptioner)
    found = [each.text for each in captioner.describe(IMAGES, max_new_tokens=12)]
    ask, limit = library(blip), {"max_new_tokens": 12}
    expected = [ask(images=each, text="", **limit)[0]["generated_text"] for each in IMAGES]
    assert found == list(map(one_line, expected))
    assert len(set(found)) > 1, "the images make a difference"


def test_a_chat_model_is_asked_about_the_image(llava):
    captioner = Captioner.load(llava)
    assert isinstance(captioner, ChatCaptioner)
    found = [each.text for each in captioner.describe(IMAGES, "describe it", max_new_tokens=12)]
    ask, more = library(llava), {"generate_kwargs": {"max_new_tokens": 12, "forced_eos_token_id": None}}
    expected = [
        ask(text=chat(each, "describe it"), return_full_text=False, **more)[0]["generated_text"]
        for each in IMAGES
    ]
    assert found == list(map(one_line, expected))
    assert len(set(found)) > 1, "the images make a difference"


def test_a_task_model_gets_the_task_and_its_answer_is_read(florence):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    captioner = Captioner.load(florence)
    assert isinstance(captioner, TaskCaptioner)
    found = [each.text for each in captioner.describe(IMAGES, "<CAPTION>", max_new_tokens=12)]
    processor = AutoProcessor.from_pretrained(florence)
    model = AutoModelForImageTextToText.from_pretrained(florence).eval()
    for image, text in zip(IMAGES, found):
        inputs = processor(images=image, text="<CAPTION>", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, forced_eos_token_id=None)
        answer = processor.batch_decode(tokens, skip_special_tokens=False)[0]
        read = processor.post_process_generation(answer, task="<CAPTION>", image_size=image.size)
        assert text == read["<CAPTION>"]
    assert len(set(found)) > 1, "the images make a difference"


@pytest.mark.parametrize("kind", ["blip", "llava", "florence"])
def test_batches_change_no_words(kind, request):
    captioner = Captioner.load(request.getfixturevalue(kind))
    together = captioner.describe(IMAGES, max_new_tokens=10)
    assert together == [captioner.describe([image], max_new_tokens=10)[0] for image in IMAGES]
    assert together == captioner.describe(IMAGES, max_new_tokens=10), "the same each time"


@pytest.mark.parametrize("kind", ["llava", "florence"])
def test_cut_descriptions_are_told(kind, request):
    """Also where the model's own settings force an end at the limit."""
    captioner = Captioner.load(request.getfixturevalue(kind))
    found = captioner.describe(IMAGES, max_new_tokens=8)
    assert {each.whole for each in found} == {True, False}
    for each in found:
        assert each.whole == (len(each.text.split()) < 8)


def test_templates_for_plain_texts(tmp_path):
    """They show a list of parts as Python would, and put the image in themselves, or leave that to us."""
    by_itself = Captioner.load(captioners.llava(tmp_path / "a", captioners.TEXT_TEMPLATE))
    left_to_us = Captioner.load(
        captioners.llava(tmp_path / "b", captioners.TEXT_TEMPLATE.replace("<image> ", ""))
    )
    found = by_itself.describe(IMAGES, "describe it", max_new_tokens=8)
    assert found == left_to_us.describe(IMAGES, "describe it", max_new_tokens=8)
    assert found != by_itself.describe(IMAGES, "the grass", max_new_tokens=8)


@pytest.mark.parametrize("kind", ["blip", "llava", "florence"])
def test_a_photograph_s_prompt(kind, request):
    model = request.getfixturevalue(kind)
    text = describe_image(IMAGES[0], model)
    asked = PHOTO_PROMPT if kind == "llava" else None
    assert text == Captioner.load(model).describe(IMAGES[:1], asked, 64)[0].text
    assert set(text.split()) <= {*captioners.WORDS, "[UNK]", "[MASK]"}


def test_foreign_tasks_are_refused_before_weights_are_read(florence, monkeypatch):
    from transformers import AutoModelForImageTextToText

    def never(*args, **kwargs):
        raise AssertionError("weights are read")

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", never)
    with pytest.raises(InputError, match=r"Got caption_prompt '<OD>'.*<CAPTION>, <DETAILED_CAPTION>"):
        Captioner.load(florence, prompt="<OD>")


def one_error(model: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as error:
        Captioner.load(model)
    assert len(str(error.value).splitlines()) == 1


def test_models_that_are_none(tmp_path, blip):
    one_error(str(tmp_path / "nothing"), r"caption_model '.*nothing'.*write the text yourself")
    (tmp_path / "cut").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "cut" / name).write_text("{")
    one_error(str(tmp_path / "cut"), "caption_model '.*cut'")


def test_models_that_read_no_images(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(BertConfig(**captioners.SMALL, vocab_size=6)).save_pretrained(tmp_path)
    one_error(str(tmp_path), "cannot describe the image .it reads no images with texts.")
