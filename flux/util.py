"""Upstream's import path: its loading functions, and the names that live elsewhere in this package."""

from pathlib import Path

import torch

from flux.bfl import track_usage_via_api
from flux.cli import save_sample as save_image
from flux.images.watermark import embed_watermark
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.find import own_lora, path_from_env
from flux.weights.hub import own_file, own_text_folder
from flux.weights.open_model import ModelFiles, OpenFiles, OpenModel

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
    lora_scale: float | None = None,
) -> Flux:
    """Load the transformer of the model `name`.

    Args:
        name: One of `flux.specs.configs`.
        device: Where it is put.
        hf_download: Whether a missing file may be downloaded.
        verbose: Whether to print the name.
        dtype: What it computes in.
        lora_scale: Strength of the LoRA that the model itself has, such as flux-dev-canny-lora. If None, as
            the model's spec says. The LoRA is merged into the weights.

    Raises:
        InputError: The name is unknown, or the file is missing or another model's.
    """
    if verbose:
        print(f"Loading {name}")
    spec = get_spec(name)
    path = Path(path_from_env(spec.env_flow) or own_file(spec, spec.repo_flow, hf_download))
    opened, scale = OpenFiles(), spec.lora_scale if lora_scale is None else lora_scale
    given = path_from_env(spec.env_lora)
    lora = own_lora(
        spec, opened.open(path, "transformer"), Path(given) if given else None, scale, hf_download
    )
    files = ModelFiles(path, path, path, own_lora=lora)
    return OpenModel(spec, files, opened).load_transformer(device, dtype)


def load_ae(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder:
    """Load the autoencoder of the model `name`. The arguments and errors are those of `load_flow_model`."""
    spec = get_spec(name)
    path = path_from_env(spec.env_ae) or own_file(spec, spec.repo_ae, hf_download)
    return _opened(spec, Path(path)).load_autoencoder(device, dtype)


def load_t5(
    device: str | torch.device = "cuda",
    max_length: int | None = None,
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """Load the T5 encoder of a model.

    Args:
        device: Where it is put.
        max_length: Tokens that a prompt is padded or cut to. If None, as the model's spec says.
        name: One of `flux.specs.configs`.
        folder: Folder with the text encoders and tokenizers. If None, the model's repository.
        dtype: What it computes in.

    Raises:
        InputError: The name is unknown, or a file is missing or another encoder's.
    """
    spec = get_spec(name)
    model = _opened(spec, folder or own_text_folder(spec, True))
    return model.load_text_encoder("text_encoder_2", device, dtype, max_length=max_length)


def load_clip(
    device: str | torch.device = "cuda",
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """Load the CLIP encoder of a model. The arguments and errors are those of `load_t5`."""
    spec = get_spec(name)
    model = _opened(spec, folder or own_text_folder(spec, True))
    return model.load_text_encoder("text_encoder", device, dtype)


def _opened(spec: ModelSpec, path: Path) -> OpenModel:
    """The model's files, of which only those at `path` are going to be opened."""
    return OpenModel(spec, ModelFiles(path, path, path))
