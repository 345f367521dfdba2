"""Tiny random models that make conditions of images, written to folders."""

from pathlib import Path

import torch
from safetensors.torch import save_file

REDUX_SIZES = 16, 20
"""Features of the tiny SigLIP and of the tiny T5."""


def save_depth_model(folder: Path) -> Path:
    """Write a Depth-Anything of random weights, and return its folder."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessorPil

    torch.manual_seed(0)
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "out_indices": [1, 2, 3, 4],
        "apply_layernorm": True,
        "reshape_hidden_states": False,
    }
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=8,
        patch_size=14,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """Write a SigLIP vision model of random weights, whose images have nine patches; return its folder."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=REDUX_SIZES[0],
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def save_redux_adapter(path: Path, sizes: tuple[int, int] = REDUX_SIZES) -> Path:
    """Write a Redux adapter of random weights, and return its path."""
    generator, (redux, txt) = torch.Generator().manual_seed(0), sizes
    shapes = {
        "redux_up.weight": (3 * txt, redux),
        "redux_up.bias": (3 * txt,),
        "redux_down.weight": (txt, 3 * txt),
        "redux_down.bias": (txt,),
    }
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, path)
    return path
