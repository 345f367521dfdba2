"""Upstream's import path. Everything here lives elsewhere."""

from pathlib import Path

import torch

from flux.bfl import track_usage_via_api
from flux.cli import save_sample as save_image
from flux.images.watermark import embed_watermark
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.find import ModelFiles, path_from_env
from flux.weights.hub import own_file, own_text_folder
from flux.weights.load import load_flow, load_net, load_text

__all__ = [
    "ModelSpec",
    "configs",
    "embed_watermark",
    "load_ae",
    "load_clip",
    "load_flow_model",
    "load_t5",
    "save_image",
    "track_usage_via_api",
]


def load_flow_model(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    verbose: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Flux:
    """The transformer of the model `name`: upstream's call."""
    if verbose:
        print(f"Loading {name}")
    spec = get_spec(name)
    flow = Path(path_from_env(spec.env_flow) or own_file(spec, spec.repo_flow, hf_download))
    return load_flow(spec, ModelFiles(flow, flow, flow), device, dtype)


def load_ae(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder:
    """The autoencoder of the model `name`: upstream's call."""
    spec = get_spec(name)
    path = path_from_env(spec.env_ae) or own_file(spec, spec.repo_ae, hf_download)
    return load_net(AutoEncoder, spec.ae_params, Path(path), device, dtype)


def load_t5(
    device: str | torch.device = "cuda",
    max_length: int | None = None,
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """The T5 encoder of the model `name`, from its repository or from `folder`: upstream's call."""
    return _own_text("text_encoder_2", device, max_length, name, folder, dtype)


def load_clip(
    device: str | torch.device = "cuda",
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """The CLIP encoder of the model `name`, from its repository or from `folder`: upstream's call."""
    return _own_text("text_encoder", device, None, name, folder, dtype)


def _own_text(
    part: str,
    device: str | torch.device,
    max_length: int | None,
    name: str,
    folder: Path | None,
    dtype: torch.dtype,
) -> HFEmbedder:
    spec = get_spec(name)
    own_length = spec.clip_length if part == "text_encoder" else spec.text_length
    folder = folder or own_text_folder(spec, True)
    return load_text(ModelFiles(folder, folder, folder), part, max_length or own_length, device, dtype)
