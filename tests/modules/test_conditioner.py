"""Texts to features, exactly as diffusers' pipeline makes them, through the tokenizers' own files."""

import json

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file

from flux.modules.conditioner import HFEmbedder
from flux.specs import NANO_FOLDER

PROMPTS = ["a dog wearing a top hat on the grass", "", "a red car, on the street."]


def test_features_equal_diffusers(nano, nano_diffusers):
    """Padding takes part in attention and no mask is given: with one, features would differ in every
    prompt.
    """
    txt, vec, _ = nano_diffusers.encode_prompt(PROMPTS, max_sequence_length=40)
    assert torch.equal(nano.t5(PROMPTS), txt)
    assert torch.equal(nano.clip(PROMPTS), vec)
    assert txt.shape == (3, 40, 256)
    assert vec.shape == (3, 128)


def test_long_prompts_are_cut(nano):
    long = "a dog and a cat and " * 20
    assert nano.t5([long]).shape == (1, 40, 256)


def test_kinds_are_told_by_their_config(nano):
    assert nano.clip.is_clip
    assert not nano.t5.is_clip
    assert (nano.t5.output_key, nano.clip.output_key) == ("last_hidden_state", "pooler_output")


def test_upstreams_call():
    """The encoder's folder, the length, and whatever `from_pretrained` takes."""
    folder = str(NANO_FOLDER / "text_encoder_2")
    embedder = HFEmbedder(
        folder, max_length=8, tokenizer=str(NANO_FOLDER / "tokenizer_2"), torch_dtype=torch.bfloat16
    )
    features = embedder(["a dog"])
    assert features.shape == (1, 8, 256)
    assert features.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in embedder.parameters())


def test_folders_within_a_repository():
    """One repository holds both encoders and their tokenizers: FLUX.1's own layout."""
    embedder = HFEmbedder(
        str(NANO_FOLDER), 32, str(NANO_FOLDER), subfolder="text_encoder", tokenizer_subfolder="tokenizer"
    )
    assert embedder.is_clip
    assert embedder(["a dog"]).shape == (1, 128)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_files_of_either_naming(nano, tmp_path, prefix):
    """Before version 5, transformers wrote CLIP's names with a prefix; both kinds of file are about."""
    weights = load_file(NANO_FOLDER / "text_encoder" / "model.safetensors")
    renamed = {prefix + name.removeprefix("text_model."): x for name, x in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = (NANO_FOLDER / "text_encoder" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    embedder = HFEmbedder(str(tmp_path), 32, str(NANO_FOLDER / "tokenizer"), dtype=torch.float32)
    assert torch.equal(embedder(PROMPTS), nano.clip(PROMPTS))


def test_a_whole_clip_model_is_read_for_its_text_half(nano, tmp_path):
    """openai's file holds both halves and says model_type "clip"."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig.from_pretrained(NANO_FOLDER / "text_encoder")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=32
    )
    whole = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    )
    whole.text_model.load_state_dict(nano.clip.hf_module.state_dict())
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip"
    embedder = HFEmbedder(str(tmp_path), 32, str(NANO_FOLDER / "tokenizer"), dtype=torch.float32)
    assert tiny_models.relative_error(embedder(PROMPTS), nano.clip(PROMPTS)) < 1e-6
