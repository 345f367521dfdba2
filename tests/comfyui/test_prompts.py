"""Prompts as rows of one conditioning, and a latent whose rows get the same noise."""

import pytest
import torch

from comfyui.prompts import encode_rows, pad_together, read_prompts, repeat_latent


class Clip:
    """Text encoders whose numbers tell which tokens they were given."""

    def tokenize(self, text):
        words = [(len(word), 1.0) for word in text.split()]
        return {"t5xxl": [words], "l": [words[:2], words[2:]]}

    def encode_from_tokens_scheduled(self, tokens):
        ids = torch.tensor([[float(token[0]) for token in tokens["t5xxl"][0]]])
        pooled = torch.tensor([[float(sum(len(chunk) for chunk in tokens["l"]))]])
        return [[ids[..., None], {"pooled_output": pooled, "name": "kept"}]]


def test_rows_are_what_each_prompt_gives_padded_alike():
    [[rows, extra]] = encode_rows(Clip(), ["a dog", "a white cat here"], 2.5)
    assert rows[..., 0].tolist() == [[1, 3, 0, 0], [1, 5, 3, 4]]
    assert extra["pooled_output"].tolist() == [[2], [4]]
    assert (extra["guidance"], extra["name"]) == (2.5, "kept")


def test_padding_keeps_what_else_a_token_holds():
    tokens = [{"t5xxl": [[(1, 1.0, 0)]]}, {"t5xxl": [[(1, 1.0, 0), (2, 1.0, 0)]]}]
    assert pad_together(tokens)[0] == {"t5xxl": [[(1, 1.0, 0), (0, 1.0, 0)]]}
    assert len(tokens[0]["t5xxl"][0]) == 1


def test_scheduled_text_encoders_are_told():
    clip = Clip()
    clip.encode_from_tokens_scheduled = lambda tokens: [[None, {}], [None, {}]]
    with pytest.raises(ValueError, match="scheduled hooks"):
        encode_rows(clip, ["a dog", "a cat"], 3.5)


def test_prompts_are_lines():
    assert read_prompts(" a cat \n\n a dog at night\n") == ["a cat", "a dog at night"]
    with pytest.raises(ValueError, match="Got no prompt: write one a line"):
        read_prompts(" \n ")


def test_all_rows_of_a_latent_have_one_noise():
    latent = {"samples": torch.randn(1, 16, 4, 4), "noise_mask": "kept"}
    repeated = repeat_latent(latent, 3)
    assert torch.equal(repeated["samples"], latent["samples"].expand(3, -1, -1, -1))
    assert (repeated["batch_index"], repeated["noise_mask"]) == ([0, 0, 0], "kept")


def test_several_images_are_told():
    with pytest.raises(ValueError, match="a latent of 2 images"):
        repeat_latent({"samples": torch.zeros(2, 16, 4, 4)}, 3)
