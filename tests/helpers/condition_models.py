"""Tiny random models that images steer, and models that make conditions of images, written to folders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.specs import ModelSpec, configs
from helpers.tiny_models import randomized

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


# ---- models that images steer


def steered_spec(kind: str | None, channels: int = 64, **changes) -> ModelSpec:
    """Return the spec of a tiny model of that kind, which has flux-nano's text encoders and autoencoder."""
    nano = configs["flux-nano"]
    params = replace(
        nano.params, in_channels=channels, hidden_size=64, num_heads=1, depth=2, depth_single_blocks=2
    )
    tiny = {"params": params, "condition": kind, "size": 64, "num_steps": 2, "vital_layers": (0, 2)}
    return replace(nano, **{**tiny, **changes})


SPECS = {
    "tiny": steered_spec(None, redux_filename="redux.safetensors"),
    "tiny-kontext": steered_spec("kontext"),
    "tiny-fill": steered_spec("fill", 384),
    "tiny-canny": steered_spec("control", 128, control="canny"),
    "tiny-depth": steered_spec("control", 128, control="depth"),
}
"""Tiny models, to be added to the table of models."""


def make_steered_folder(monkeypatch, folder: Path) -> Path:
    """Put the `SPECS` into the table of models, and images into a folder that becomes the current one."""
    for name, spec in SPECS.items():
        monkeypatch.setitem(configs, name, spec)
    monkeypatch.chdir(folder)
    save_image(folder / "a.png")
    save_image(folder / "b.png", seed=5)
    save_image(folder / "wide.png", 128, 64, seed=1)
    save_mask(folder / "mask.png")
    return folder


def steered_pipe(nano: LoadedModel, name: str) -> LoadedModel:
    """Return a pipeline of one of the `SPECS`, with the networks of flux-nano but for the transformer."""
    spec = SPECS[name]
    return replace(nano, spec=spec, model=randomized(Flux(spec.params), 0))


def save_steered(name: str, folder: Path) -> Path:
    """Write random weights of one of the `SPECS`, and return the file's path."""
    path = folder / f"{name}.safetensors"
    save_file(randomized(Flux(SPECS[name].params), 0).state_dict(), path)
    return path


def save_image(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> str:
    """Write an image of coloured blocks, and return its path."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST).save(path)
    return str(path)


def save_mask(path: Path, width: int = 64, height: int = 64, white: bool = True) -> str:
    """Write a mask whose right half is white, or a black one, and return its path."""
    levels = np.zeros((height, width), np.uint8)
    levels[:, width // 2 :] = 255 * white
    Image.fromarray(levels).save(path)
    return str(path)
