"""Token counts, with flux-nano's tokenizers: a word is a token, T5 adds an end, CLIP both ends."""

import pytest

from flux.captions.tokens import TokenCounter
from flux.errors import InputError
from flux.specs import configs

NANO = str(configs["flux-nano"].folder)


def test_counts():
    found = TokenCounter.load(NANO).lengths({"a.png": "a dog on the grass", "b.png": "a dog"})
    assert found == {"CLIP": {"a.png": 7, "b.png": 4}, "T5": {"a.png": 6, "b.png": 3}}


def test_texts_that_are_cut_are_named():
    texts = {f"{number}.png": "dog " * length for number, length in enumerate((10, 75, 76, 511, 512))}
    clip, t5 = TokenCounter.load(NANO).report(texts)
    assert clip == "CLIP: at most 514 tokens (4.png), of 77 that it reads; 3 are cut: 2.png, 3.png, 4.png"
    assert t5 == "T5: at most 513 tokens (4.png), of 512 that it reads; 1 are cut: 4.png"


def test_the_environment_names_tokenizers(monkeypatch):
    monkeypatch.setenv("FLUX_TEXT_ENCODERS", NANO)
    assert TokenCounter.load().lengths({"a": "a dog"})["T5"] == {"a": 3}


def test_without_tokenizers(monkeypatch, tmp_path):
    """Neither cached nor, offline, to be had."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"FLUX\.1-schnell"):
        TokenCounter.load()
    with pytest.raises(InputError, match="without its vocabulary"):
        TokenCounter.load(str(tmp_path))
