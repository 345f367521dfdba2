"""From a model's name to its nets: find or download the files, read them strictly, put them on a device."""

import hashlib
import json
import operator
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.settings import ModelSettings
from flux.specs import ModelSpec, get_spec

MAX_HEADER = 100_000_000  # bytes, the format's own bound
OTHER_KINDS = {
    b"version https://git-lfs": "a Git-LFS pointer and not the file itself: run `git lfs pull`",
    b"GGUF": "a GGUF file: give a .safetensors file",
    b"PK\x03\x04": "a pickle: give a .safetensors file",
    b"\x80": "a pickle: give a .safetensors file",
    b"<": "a web page: the download went wrong, fetch it again",
}
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
            read_header(Path(path))
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

    with _hub_errors(spec, filename):
        return Path(hf_hub_download(spec.repo_id, filename, local_files_only=not download))


def _own_text_folder(spec: ModelSpec, download: bool) -> Path:
    if spec.folder is not None:
        return spec.folder
    from huggingface_hub import snapshot_download

    patterns = [f"{folder}/*" for folder in TEXT_FOLDERS]
    with _hub_errors(spec, "the text encoders"):
        return Path(snapshot_download(spec.repo_id, allow_patterns=patterns, local_files_only=not download))


def _check_text_folder(folder: Path) -> None:
    missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")
    for encoder in ("text_encoder", "text_encoder_2"):
        files = list((folder / encoder).glob("*.safetensors"))
        if not files:
            raise InputError(f"Got {folder / encoder}, which holds no .safetensors file")
        for path in files:
            read_header(path)


@contextmanager
def _hub_errors(spec: ModelSpec, what: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        from huggingface_hub import errors

        repo = spec.repo_id
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{repo}"
        if isinstance(error, errors.GatedRepoError):
            reason = (
                f"access to it has to be asked for: accept its licence ({spec.licence}) at {page}, "
                "then log in with `hf auth login` or set HF_TOKEN"
            )
        elif isinstance(error, errors.LocalEntryNotFoundError):
            reason = (
                "it is not on this machine, and the hub cannot be reached or HF_HUB_OFFLINE is set: "
                "go online, or give the files' paths"
            )
        else:
            reason = str(error).strip().splitlines()[0]
        raise InputError(f"Could not get {what} of {repo} from the hub: {reason}") from error


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a safetensors file, by name. Reads its head only.

    Raises:
        InputError: no whole safetensors file; the message says what it is instead.
    """
    if not path.exists():
        raise InputError(f"Got {path}, which does not exist: give the path of a .safetensors file")
    if path.is_dir():
        raise InputError(f"Got {path}, which is a folder: give the path of the .safetensors file itself")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(64)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            is_safetensors = start[8:9] == b"{" and 2 <= length <= MAX_HEADER
            file.seek(8)
            header = file.read(length) if is_safetensors else b""
    except OSError as error:
        raise InputError(f"Got {path}, which cannot be read: {error.strerror}") from error
    if not is_safetensors:
        kind = next((kind for magic, kind in OTHER_KINDS.items() if start.startswith(magic)), None)
        if kind is None:
            kind = f"no safetensors file ({size} bytes): it may be cut short, or of another format"
        raise InputError(f"Got {path}, which is {kind}")
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        ends = [operator.index(entry["data_offsets"][1]) for entry in entries.values()]
        shapes = {name: tuple(map(operator.index, entry["shape"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"Got {path}, whose header is broken: it may be cut short, fetch it again"
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise InputError(
            f"Got {path} with {size} bytes, expected {expected}: the download did not finish, fetch it again"
        )
    return shapes


def _is_weight(name: str) -> bool:
    """Whether a tensor is a net's: not a marker or a scale of the scaled 8-bit form.

    Scales of activations (scale_input) would serve an 8-bit product only.
    """
    return name != "scaled_fp8" and not name.endswith((".scale_weight", ".scale_input"))


def fingerprint(path: Path) -> str:
    """Tells one weights file from another without reading all of it: a hash of its size, its header, and
    4 KiB from the middle of each tensor and from the end of the file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = file.read(length)
        digest.update(header)
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                file.seek(8 + length + max(begin, (begin + end) // 2 - 2048))
                digest.update(file.read(min(4096, end - begin)))
        file.seek(max(0, size - 4096))
        digest.update(file.read())
    return digest.hexdigest()[:32]


def checkpoint_of(settings: ModelSettings) -> str | None:
    """Fingerprint of the transformer that these settings load; None if its file is not on this machine."""
    try:
        files = find_files(
            settings.model, settings.weights, settings.ae_weights, settings.text_encoders, False
        )
    except InputError:
        return None
    return fingerprint(files.flow)


def read_weights(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a safetensors file in `dtype`, 8-bit floats with their scales multiplied in.

    Raises:
        InputError: no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    names = read_header(path)
    weights = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in filter(_is_weight, names):
                tensor = file.get_tensor(name)
                scale = name.removesuffix(".weight") + ".scale_weight"
                if name.endswith(".weight") and scale in names:
                    tensor = tensor.float() * file.get_tensor(scale).float()
                weights[name] = tensor.to(dtype)
    except SafetensorError as error:
        raise InputError(f"Got {path}, which cannot be read as safetensors: {error}") from error
    return weights


def check_fit(net: nn.Module, path: Path) -> None:
    """Raises InputError unless a file's names and shapes are exactly those of the net, saying what differs.

    Reads the file's head only; the net may lie on the meta device.
    """
    own = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: shape for name, shape in read_header(path).items() if _is_weight(name)}
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    reshaped = [
        f"{name} {found[name]} instead of {own[name]}"
        for name in sorted(own.keys() & found.keys())
        if found[name] != own[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape:": reshaped}
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if not problems:
        return
    hint = ""
    if not reshaped and all(name.startswith("guidance_in.") for name in (*missing, *unexpected)):
        hint = "; it is a dev file (it has guidance_in), load it as flux-dev"
        if missing:
            hint = "; it is a schnell file (no guidance_in), load it as flux-schnell"
    raise InputError(f"{path} is not this model's: {'; '.join(problems)}{hint}")


def on_meta(net_class: type, params) -> nn.Module:
    """A net without memory of its own."""
    with torch.device("meta"):
        return net_class(params)


def load_net(
    net_class: type, params, path: Path, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A net with the weights of a file: built without memory of its own, filled straight onto the device."""
    net = on_meta(net_class, params)
    check_fit(net, path)
    net.load_state_dict(read_weights(path, device, dtype), assign=True)
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
    _check_text_folder(folder)
    encoder, tokenizer = folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}"
    return HFEmbedder(str(encoder), max_length, str(tokenizer), dtype=dtype).to(device)
