"""Files identified by their tensors' names: other models and other parts are named in one line."""

import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_models, weight_files

from flux.errors import InputError
from flux.weights.checkpoint import Checkpoint
from flux.weights.identify import OTHER_MODELS, describe_checkpoint

OTHERS = {
    "an SDXL model": [
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "a Stable Diffusion model": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "a Stable Diffusion 3 transformer": ["pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight"],
    "a Chroma transformer": ["distilled_guidance_layer.in_proj.weight", "img_in.weight"],
    "a FLUX.2 transformer": ["double_stream_modulation_img.lin.weight", "img_in.weight"],
    "a Qwen-Image transformer": ["transformer_blocks.0.img_mod.1.weight", "img_in.weight"],
    "a Wan transformer": ["blocks.0.cross_attn.k.weight"],
    "a Lumina or Z-Image transformer": ["noise_refiner.0.attention.qkv.weight"],
    "a ControlNet, which is not supported": ["controlnet_x_embedder.weight", "x_embedder.weight"],
    "an IP-Adapter, which is not supported": ["double_blocks.0.processor.ip_adapter_k_proj.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight"],
    "an image encoder": ["vision_model.embeddings.patch_embedding.weight"],
    "an autoencoder (give it as ae_weights)": ["decoder.mid.attn_1.q.weight"],
    "a T5 encoder (give it as t5_weights)": ["encoder.block.0.layer.0.SelfAttention.k.weight"],
    "a CLIP text encoder (give it as clip_weights)": ["text_model.embeddings.token_embedding.weight"],
    "a LoRA or another adapter (give it as lora)": [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    ],
    "1 tensors of a model not known here (it begins with 'nothing')": ["nothing"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_other_nets_are_named(tmp_path, what):
    path = weight_files.save({name: torch.zeros(2, 2) for name in OTHERS[what]}, tmp_path / "m.safetensors")
    with pytest.raises(InputError) as error:
        weight_files.load(path)
    message = str(error.value)
    assert f"which is {what}" in message
    assert message.endswith("expected a FLUX.1 transformer")
    assert "\n" not in message


def test_an_unknown_file_is_told_by_what_it_says_of_itself(tmp_path):
    about = {"modelspec.architecture": "some-model-v1"}
    path = weight_files.save({"nothing": torch.zeros(1)}, tmp_path / "m.safetensors", **about)
    with pytest.raises(
        InputError, match=r"not known here .*; it says that it is for 'some-model-v1'; expected"
    ):
        weight_files.load(path)


def test_a_gguf_file_says_its_architecture(tmp_path):
    weight_files.save_gguf({"nothing": torch.zeros(32)}, tmp_path / "m.gguf", "Q8_0", architecture="mamba")
    with pytest.raises(InputError, match=r"it says that it is for 'mamba'; expected a FLUX.1 transformer"):
        weight_files.load(tmp_path / "m.gguf")


def test_nothing_at_all():
    assert describe_checkpoint(Checkpoint(Path("m"), (), {})) == "0 tensors of a model not known here"


def test_no_flux_file_is_taken_for_another_model(source, weights):
    """The signs of other models match no name of ours, in either layout."""
    names = [
        *weights,
        *tiny_models.to_diffusers_transformer(weights, 32),
        *tiny_models.autoencoder().state_dict(),
    ]
    assert not [name for name in names for sign, _ in OTHER_MODELS if re.search(sign, name)]
