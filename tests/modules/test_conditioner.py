"""Text features equal those of diffusers' pipeline bit for bit."""

import json

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file

from flux.errors import InputError
from flux.modules.conditioner import HFEmbedder, cut_words, unreadable_words
from flux.specs import NANO_FOLDER

PROMPTS = ["a dog wearing a top hat on the grass", "", "a red car, on the street."]


def test_features_equal_diffusers(nano, nano_diffusers):
    """Padding takes part in the attention. With a mask, the features of every prompt would differ."""
    txt, vec, _ = nano_diffusers.encode_prompt(PROMPTS, max_sequence_length=40)
    assert torch.equal(nano.t5(PROMPTS), txt)
    assert torch.equal(nano.clip(PROMPTS), vec)
    assert txt.shape == (3, 40, 256)
    assert vec.shape == (3, 128)


@pytest.mark.filterwarnings("ignore:The model sees only")
def test_long_prompts_are_truncated(nano):
    long = "a dog and a cat and " * 20
    assert nano.t5([long]).shape == (1, 40, 256)


def test_words_that_are_cut_off_are_listed(nano):
    assert cut_words(nano.t5, "a dog on the grass") == []
    assert cut_words(nano.t5, "a dog and " * 13) == []
    assert cut_words(nano.t5, "a dog and " * 13 + "in the snow.") == ["in", "the", "snow."]


def test_a_word_that_is_cut_in_two_is_listed(nano):
    assert cut_words(nano.t5, "a dog and " * 12 + "zyzzyva a") == ["zyzzyva", "a"]


def test_of_text_without_blanks_the_rest_is_listed(nano):
    [rest] = cut_words(nano.t5, "z" * 80)
    assert 40 <= len(rest) <= 42


def test_words_without_tokens_are_listed(nano):
    assert unreadable_words(nano.t5, "a dog — on, the grass & zyzzyva") == []
    assert unreadable_words(nano.t5, "a 猫 on the 草地。 🐶") == ["猫", "草地。"]


def test_a_prompt_that_is_cut_off_is_told_in_one_line(nano):
    with pytest.warns(
        UserWarning, match=r"only the first 40 tokens of 'a dog and .*last words, 'in the snow'"
    ) as found:
        nano.condition(["a dog and " * 13 + "in the snow", "a dog"], 3.5)
    assert len(found) == 1
    assert "\n" not in str(found[0].message)


def test_a_negative_prompt_that_is_cut_off_is_told(nano):
    with pytest.warns(UserWarning, match="'in the snow'"):
        nano.condition(["a dog"], 3.5, true_cfg=2.0, negative_prompt="a dog and " * 13 + "in the snow")


def test_letters_that_t5_lacks_are_told(nano):
    with pytest.warns(UserWarning, match="no tokens for '草地' in 'a dog on 草地'"):
        nano.t5(["a dog on 草地"])


def test_the_config_tells_which_encoder_it_is(nano):
    assert nano.clip.is_clip
    assert not nano.t5.is_clip
    assert (nano.t5.output_key, nano.clip.output_key) == ("last_hidden_state", "pooler_output")


def test_upstreams_call():
    """Upstream gives the encoder's folder, the length and arguments of `from_pretrained`."""
    folder = str(NANO_FOLDER / "text_encoder_2")
    embedder = HFEmbedder(
        folder, max_length=8, tokenizer=str(NANO_FOLDER / "tokenizer_2"), torch_dtype=torch.bfloat16
    )
    features = embedder(["a dog"])
    assert features.shape == (1, 8, 256)
    assert features.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in embedder.parameters())


def test_folders_within_a_repository():
    """FLUX.1's repository holds both encoders and their tokenizers."""
    embedder = HFEmbedder(
        str(NANO_FOLDER), 32, str(NANO_FOLDER), subfolder="text_encoder", tokenizer_subfolder="tokenizer"
    )
    assert embedder.is_clip
    assert embedder(["a dog"]).shape == (1, 128)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_clip_files_of_either_naming(nano, tmp_path, prefix):
    """transformers wrote CLIP's names with a prefix before version 5. Both kinds of file exist."""
    weights = load_file(NANO_FOLDER / "text_encoder" / "model.safetensors")
    renamed = {prefix + name.removeprefix("text_model."): x for name, x in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = (NANO_FOLDER / "text_encoder" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    embedder = HFEmbedder(str(tmp_path), 32, str(NANO_FOLDER / "tokenizer"), dtype=torch.float32)
    assert torch.equal(embedder(PROMPTS), nano.clip(PROMPTS))


def test_the_text_encoder_of_a_whole_clip_model_is_read(nano, tmp_path):
    """OpenAI's file also holds the vision encoder and has the model_type "clip"."""
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


def test_files_without_all_weights_are_refused(tmp_path):
    weights = load_file(NANO_FOLDER / "text_encoder" / "model.safetensors")
    weights = {name: x for name, x in weights.items() if not name.endswith("final_layer_norm.weight")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((NANO_FOLDER / "text_encoder" / "config.json").read_text())
    with pytest.raises(InputError, match=r"is no whole CLIPTextModel: .*final_layer_norm"):
        HFEmbedder(str(tmp_path), 32, str(NANO_FOLDER / "tokenizer"))
