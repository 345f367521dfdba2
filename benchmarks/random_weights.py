"""Writes random weights with a model's names and shapes, so that nothing is downloaded."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux.files import claim_folder
from flux.model import Flux, FluxParams
from flux.modules.autoencoder import AutoEncoder
from flux.specs import ModelSpec
from flux.weights.open_model import ModelFiles

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def write_random_model(folder: Path, spec: ModelSpec, words: set[str], device: torch.device) -> ModelFiles:
    """Write files for all four models of a spec, laid out as its repository.

    Transformer and autoencoder have their true sizes. The text encoders have one layer and their true output
    width. A transformer that is in the folder stays.

    Args:
        folder: The folder of the files. No other process may write to it meanwhile.
        spec: The spec of the model.
        words: The words that the tokenizers know.
        device: Where random numbers are drawn. A GPU draws the twelve billion of flux-dev in a second.
    """
    files = ModelFiles(folder / spec.repo_flow, folder / spec.repo_ae, folder)
    claim_folder(folder)
    torch.manual_seed(0)
    if not files.flow.exists():
        partial = files.flow.with_suffix(".partial")  # a file that a stopped run left half must not stay
        save_file(random_transformer(spec.params, device), partial)
        os.replace(partial, files.flow)
    save_file(AutoEncoder(spec.ae_params).state_dict(), files.ae)
    write_text_encoders(folder, spec, words)
    return files


def random_transformer(params: FluxParams, device: torch.device) -> dict[str, Tensor]:
    """Draw the state dict of a `Flux` in bfloat16. Activations stay of order one through all layers."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux(params).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if name.endswith(".scale"):
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            deviation = shape[-1] ** -0.5 if len(shape) == 2 else 0.02
            drawn = torch.randn(shape, device=device, dtype=torch.bfloat16)
            weights[name] = drawn.mul_(deviation)
    return weights


def write_text_encoders(folder: Path, spec: ModelSpec, words: set[str]) -> None:
    """Write the folders text_encoder (CLIP), text_encoder_2 (T5), tokenizer and tokenizer_2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    pad, end, unknown = SPECIAL_TOKENS
    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    words_of = {"pad_token": pad, "eos_token": end, "unk_token": unknown}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words_of)
    for name in ("tokenizer", "tokenizer_2"):
        wrapped.save_pretrained(folder / name)

    clip = CLIPTextConfig(
        vocab_size=len(vocabulary),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=0,
        hidden_size=spec.params.vec_in_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=spec.clip_length,
    )
    t5 = T5Config(
        vocab_size=len(vocabulary),
        pad_token_id=0,
        eos_token_id=1,
        d_model=spec.params.context_in_dim,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    CLIPTextModel(clip).bfloat16().save_pretrained(folder / "text_encoder")
    T5EncoderModel(t5).bfloat16().save_pretrained(folder / "text_encoder_2")


def write_dinov2(folder: Path, device: torch.device) -> Path:
    """Write a DINOv2 of the size that the paper scores with, ViT-g/14. One that is in the folder stays."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    if not (folder / "model.safetensors").exists():
        giant = Dinov2Config(
            hidden_size=1536,
            num_hidden_layers=40,
            num_attention_heads=24,
            use_swiglu_ffn=True,
            patch_size=14,
            image_size=518,
        )
        with torch.device(device):
            model = Dinov2Model(giant)
        size: dict[str, Any] = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
        BitImageProcessorPil(**size).save_pretrained(folder)
        partial = folder / "partial"
        model.save_pretrained(partial)
        for name in ("config.json", "model.safetensors"):
            os.replace(partial / name, folder / name)
        partial.rmdir()
    return folder
