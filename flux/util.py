"""Upstream's import path: its loading functions, and the names that live elsewhere in this package."""

import getpass
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.bfl import track_usage_via_api
from flux.conditions.kontext import PREFERED_KONTEXT_RESOLUTIONS, aspect_ratio_to_height_width
from flux.errors import InputError, reason_of
from flux.images.watermark import WATERMARK_BITS, WATERMARK_MESSAGE, WatermarkEmbedder, embed_watermark
from flux.model import Flux, FluxLoraWrapper
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.gguf_blocks import BLOCKS
from flux.runtime.devices import pick_device
from flux.sessions.files import save_sample as save_image
from flux.specs import ModelSpec, configs, get_spec
from flux.weights.find import own_lora, path_from_env
from flux.weights.hub import CHECKPOINTS_DIR, own_file, own_text_folder
from flux.weights.open_model import ModelFiles, OpenFiles, OpenModel
from flux.weights.scales import ScaledTensor

__all__ = [
    "BFL_API_KEY",
    "CHECKPOINTS_DIR",
    "PREFERED_KONTEXT_RESOLUTIONS",
    "WATERMARK_BITS",
    "WATERMARK_MESSAGE",
    "ModelSpec",
    "WatermarkEmbedder",
    "aspect_ratio_to_height_width",
    "configs",
    "embed_watermark",
    "ensure_hf_auth",
    "get_checkpoint_path",
    "load_ae",
    "load_clip",
    "load_flow_model",
    "load_t5",
    "optionally_expand_state_dict",
    "print_load_warning",
    "prompt_for_hf_auth",
    "save_image",
    "track_usage_via_api",
]

BFL_API_KEY = os.environ.get("BFL_API_KEY")
"""The key as it was at import. `flux.bfl` reads the variable when it needs it."""


def load_flow_model(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    verbose: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    lora_scale: float = 1.0,
) -> Flux:
    """Load the transformer of the model `name`.

    A control LoRA as Black Forest Labs publishes it stays beside the weights: then this is a
    `FluxLoraWrapper`, whose `set_lora_scale` changes its strength. Over GGUF files, and in other forms, it is
    merged.

    Args:
        name: One of `flux.specs.configs`.
        device: Where it is put.
        hf_download: Whether a missing file may be downloaded.
        verbose: Whether to print the name.
        dtype: What it computes in.
        lora_scale: Strength of the LoRA that the model itself has, such as flux-dev-canny-lora.

    Raises:
        InputError: The name or the device is unknown, or the file is missing or another model's.
    """
    spec, device = get_spec(name), pick_device(str(device))
    if verbose:
        print(f"Loading {name}")
    path = path_from_env(spec.env_flow) or own_file(spec, spec.repo_flow, hf_download)
    opened = OpenFiles()
    transformer, given = opened.open(path, "transformer"), path_from_env(spec.env_lora)
    lora = own_lora(spec, transformer, given, lora_scale, hf_download)
    model = OpenModel(spec, ModelFiles(path, path, path, own_lora=lora), opened)
    if lora is not None and spec.condition == "control":
        tensors = opened.open(lora.path).tensors
        wrapper = _empty_wrapper(model, tensors, lora_scale)
        if wrapper is not None:
            without = replace(model.files, own_lora=lora._replace(strength=0.0))
            base = OpenModel(spec, without, opened).load_transformer(device, dtype).state_dict()
            beside = {key: x.read(device).to(dtype) for key, x in tensors.items() if key not in base}
            wrapper.load_state_dict(base | beside, assign=True)
            return wrapper.eval().requires_grad_(False)
    return model.load_transformer(device, dtype)


def _empty_wrapper(
    model: OpenModel, lora: Mapping[str, ScaledTensor], scale: float
) -> FluxLoraWrapper | None:
    """A wrapper without memory that takes a LoRA's tensors by their names; None if they do not fit it."""
    sources = model.transformer.sources.values()
    downs = [tensor.shape[0] for name, tensor in lora.items() if name.endswith(".lora_A.weight")]
    if not downs or any(source.is_packed and source.kind in BLOCKS for source in sources):
        return None
    with torch.device("meta"):
        wrapper = FluxLoraWrapper(max(downs), scale, model.spec.params)
    shapes = {name: tuple(x.shape) for name, x in wrapper.state_dict().items()}
    beside = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    found = {name: tensor.shape for name, tensor in lora.items() if name in beside}
    return wrapper if found == beside and lora.keys() <= shapes.keys() else None


def load_ae(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder:
    """Load the autoencoder of the model `name`. The arguments and errors are those of `load_flow_model`."""
    spec, device = get_spec(name), pick_device(str(device))
    path = path_from_env(spec.env_ae) or own_file(spec, spec.repo_ae, hf_download)
    return _opened(spec, path).load_autoencoder(device, dtype)


def load_t5(
    device: str | torch.device = "cuda",
    max_length: int | None = None,
    name: str = "flux-dev",
    folder: str | Path | None = None,
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
        InputError: The name or the device is unknown, or a file is missing or another encoder's.
    """
    spec, device = get_spec(name), pick_device(str(device))
    model = _opened(spec, Path(folder or own_text_folder(spec, True)))
    return model.load_text_encoder("text_encoder_2", device, dtype, max_length=max_length)


def load_clip(
    device: str | torch.device = "cuda",
    name: str = "flux-dev",
    folder: str | Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """Load the CLIP encoder of a model. The arguments and errors are those of `load_t5`."""
    spec, device = get_spec(name), pick_device(str(device))
    model = _opened(spec, Path(folder or own_text_folder(spec, True)))
    return model.load_text_encoder("text_encoder", device, dtype)


def _opened(spec: ModelSpec, path: Path) -> OpenModel:
    """The model's files, of which only those at `path` are going to be opened."""
    return OpenModel(spec, ModelFiles(path, path, path))


# ---- files and tokens


def get_checkpoint_path(repo_id: str, filename: str, env_var: str) -> Path:
    """Find a file of a repository: by a variable, in upstream's folder, in the hub's cache, or on the hub.

    Args:
        repo_id: The repository, "owner/name".
        filename: The file in it.
        env_var: Environment variable that may name a local file instead.

    Raises:
        InputError: The variable names a file that does not exist, or it cannot be downloaded.
    """
    given = path_from_env((env_var,))
    if given is not None:
        return given
    owners = (
        spec for spec in configs.values() if repo_id in (spec.repo_id, spec.lora_repo_id, spec.redux_repo_id)
    )
    spec = next(owners, replace(configs["flux-dev"], licence="its licence is on its page"))
    return own_file(spec, filename, True, repo_id)


def ensure_hf_auth() -> bool:
    """Return whether this machine has a token for the hub: in HF_TOKEN, or of an earlier login."""
    from huggingface_hub import get_token

    return get_token() is not None


def prompt_for_hf_auth() -> bool:
    """Ask for a token for the hub on the terminal, and log in with it.

    Raises:
        InputError: None was typed, or the hub does not accept it.
    """
    from huggingface_hub import login

    token = getpass.getpass("Token for the Hugging Face hub (not shown): ").strip()
    if not token:
        raise InputError("Got no token for the hub: make one at https://huggingface.co/settings/tokens")
    try:
        login(token=token)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Got a token that the hub does not accept ({reason_of(error)}): make a new one"
        ) from error
    return True


# ---- state dicts


def print_load_warning(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Print the names that `load_state_dict` returned."""
    for kind, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            print("\n\t".join([f"Got {len(names)} {kind} tensors:", *names]))


def optionally_expand_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad tensors with zeros at their ends where the model's are larger, as for a LoRA that widens an input.

    Args:
        model: The model.
        state_dict: Tensors by name. It is not changed.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    expanded = dict(state_dict)
    for name in shapes.keys() & expanded.keys():
        x, shape = expanded[name], shapes[name]
        if x.ndim == len(shape) and any(more > own for own, more in zip(x.shape, shape)):
            missing = [max(0, more - own) for own, more in zip(x.shape, shape)]
            expanded[name] = F.pad(x, [side for count in reversed(missing) for side in (0, count)])
    return expanded
