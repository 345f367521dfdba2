"""From a model's name to its nets: find or download the files, read them strictly, put them on a device."""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.specs import ModelSpec, get_spec

TEXT_FOLDERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@dataclass(frozen=True)
class ModelFiles:
    """Where one model's nets lie: two safetensors files, and the folder that holds `TEXT_FOLDERS`."""

    flow: Path
    ae: Path
    text: Path


def find_files(
    name: str,
    flow: str | None = None,
    ae: str | None = None,
    text: str | None = None,
    download: bool = True,
) -> ModelFiles:
    """The files of the model `name`; what is not on this machine is downloaded, with a progress bar.

    Each file is the one given here, else the one an environment variable names (`ModelSpec.env_flow`,
    `env_ae`), else the package's own or the hub's. All that is local is checked before anything is
    downloaded.

    Raises:
        InputError: a path that is no readable safetensors file, or a download that fails.
    """
    spec = get_spec(name)
    flow, ae = flow or _from_env(spec.env_flow), ae or _from_env(spec.env_ae)
    for path in (flow, ae):
        if path:
            check_safetensors(Path(path))
    if text:
        _check_text_folder(Path(text))
    return ModelFiles(
        Path(flow) if flow else _own_file(spec, spec.repo_flow, download),
        Path(ae) if ae else _own_file(spec, spec.repo_ae, download),
        Path(text) if text else _own_text_folder(spec, download),
    )


def _from_env(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _own_file(spec: ModelSpec, filename: str, download: bool) -> Path:
    if spec.folder is not None:
        return spec.folder / filename
    from huggingface_hub import hf_hub_download

    with _hub_errors(spec):
        return Path(hf_hub_download(spec.repo_id, filename, local_files_only=not download))


def _own_text_folder(spec: ModelSpec, download: bool) -> Path:
    if spec.folder is not None:
        return spec.folder
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/*" for folder in TEXT_FOLDERS]
    with _hub_errors(spec):
        folder = Path(snapshot_download(spec.repo_id, allow_patterns=patterns, local_files_only=not download))
    _check_text_folder(folder)
    return folder


def _check_text_folder(folder: Path) -> None:
    missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")


class _hub_errors:
    """Turns what the hub's client raises into one line that says what to do."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if not isinstance(error, (OSError, ValueError)) or isinstance(error, InputError):
            return
        from huggingface_hub import errors

        repo = self.spec.repo_id
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}"
        if isinstance(error, errors.GatedRepoError):
            reason = (
                f"access to it has to be asked for: accept its licence ({self.spec.licence}) at {page}, "
                "then log in with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = (
                "it is not on this machine, and the hub cannot be reached or HF_HUB_OFFLINE is set: "
                "go online, or give the files' paths"
            )
        else:
            reason = str(error).strip().splitlines()[0]
        raise InputError(f"Could not get {repo} from the hub: {reason}") from error


def check_safetensors(path: Path) -> None:
    """Raises InputError, saying what the file is instead, unless `path` is a whole safetensors file. Reads
    its head only.
    """
    if not path.exists():
        raise InputError(f"Got {path}, which does not exist: give the path of a .safetensors file")
    if path.is_dir():
        raise InputError(f"Got {path}, which is a folder: give the path of the .safetensors file itself")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"Got {path}, which cannot be read: {error.strerror}") from error
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"Got {path}, which is a Git-LFS pointer and not the file itself: run `git lfs pull`"
        )
    for magic, kind in (
        (b"GGUF", "a GGUF file"),
        (b"PK\x03\x04", "a pickle"),
        (b"\x80", "a pickle"),
        (b"<", "a web page"),
    ):
        if head.startswith(magic) and head[8:9] != b"{":
            raise InputError(f"Got {path}, which is {kind}: give a .safetensors file")
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if head[8:9] != b"{" or not 2 <= length <= 100_000_000:
        raise InputError(
            f"Got {path}, which is no safetensors file ({size} bytes): it may be cut short or another format"
        )
    expected = 8 + length + _data_bytes(path, length)
    if size != expected:
        raise InputError(
            f"Got {path} with {size} bytes, expected {expected}: the download did not finish, fetch it again"
        )


def _data_bytes(path: Path, header_bytes: int) -> int:
    import json

    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(header_bytes))
            return max(
                (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"),
                default=0,
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise InputError(
                f"Got {path}, whose header is broken: it may be cut short, fetch it again"
            ) from error


def read_weights(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a safetensors file in `dtype`, 8-bit floats with their scales multiplied in."""
    from safetensors import safe_open

    check_safetensors(path)
    weights, scales = {}, {}
    with safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys():
            if name.endswith(".scale_weight"):
                scales[name.removesuffix(".scale_weight") + ".weight"] = file.get_tensor(name)
        for name in file.keys():
            # Markers of the scaled 8-bit form, and scales of activations, which only an 8-bit product would
            # need.
            if name == "scaled_fp8" or name.endswith((".scale_weight", ".scale_input")):
                continue
            tensor = file.get_tensor(name)
            if name in scales:
                tensor = tensor.float() * scales[name].float()
            weights[name] = tensor.to(dtype)
    return weights


def load_strictly(net: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Makes `weights` the parameters of `net`, whose own may lie on the meta device.

    Raises:
        InputError: unless names and shapes are exactly those of the net; the message names what differs.
    """
    own = net.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if weights[name].shape != own[name].shape
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape:", sorted(shapes)),
        )
        if names
    ]
    if problems:
        guidance = [name.startswith("guidance_in.") for name in (*missing, *unexpected)]
        hint = ""
        if guidance and all(guidance) and not shapes:
            hint = (
                "; it is a schnell file (no guidance_in), load it as flux-schnell"
                if missing
                else "; it is a dev file (it has guidance_in), load it as flux-dev"
            )
        raise InputError(f"{path} is not this model's: {'; '.join(problems)}{hint}")
    net.load_state_dict(weights, assign=True)


def load_net(
    net_class: type, params, path: Path, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A net with the weights of a file: built without memory of its own, filled straight onto the device."""
    with torch.device("meta"):
        net = net_class(params)
    load_strictly(net, read_weights(path, device, dtype), path)
    return net.eval().requires_grad_(False)


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
    path = _from_env(spec.env_flow) or _own_file(spec, spec.repo_flow, hf_download)
    return load_net(Flux, spec.params, Path(path), device, dtype)


def load_ae(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder:
    """The autoencoder of the model `name`: upstream's call."""
    spec = get_spec(name)
    path = _from_env(spec.env_ae) or _own_file(spec, spec.repo_ae, hf_download)
    return load_net(AutoEncoder, spec.ae_params, Path(path), device, dtype)


def load_t5(
    device: str | torch.device = "cuda",
    max_length: int | None = None,
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """The T5 encoder of the model `name`, from its repository or from `folder`: upstream's call."""
    spec = get_spec(name)
    return _load_text(
        folder or _own_text_folder(spec, True), "_2", max_length or spec.text_length, device, dtype
    )


def load_clip(
    device: str | torch.device = "cuda",
    name: str = "flux-dev",
    folder: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> HFEmbedder:
    """The CLIP encoder of the model `name`, from its repository or from `folder`: upstream's call."""
    spec = get_spec(name)
    return _load_text(folder or _own_text_folder(spec, True), "", spec.clip_length, device, dtype)


def _load_text(
    folder: Path, suffix: str, max_length: int, device: str | torch.device, dtype: torch.dtype
) -> HFEmbedder:
    encoder, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    return HFEmbedder(str(encoder), max_length, str(tokenizer), dtype=dtype).to(device)
