"""From a model's name to its nets: find the files, read them strictly, put them on a device."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.layers import timestep_embedding
from flux.modules.linear import PackedLinear
from flux.settings.demos import ModelSettings
from flux.specs import ModelSpec, get_spec
from flux.weights import lora
from flux.weights.checkpoint import EIGHT_BIT, fingerprint, json_of, open_checkpoint, short
from flux.weights.hub import TEXT_FOLDERS, own_file, own_text_folder
from flux.weights.layouts import TITLES, Source, holds, sources

CONTROL_INPUTS = {128: "a canny or depth model", 384: "a fill model"}
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class ModelFiles:
    """Where one model's nets lie. Each path is a file, or a folder in diffusers' layout.

    Attributes:
        flow, ae: the transformer and the autoencoder.
        text: the folder that holds `TEXT_FOLDERS`; t5, clip: those encoders' weights, if they lie elsewhere.
        loras: files of differences with the strength of each.
    """

    flow: Path
    ae: Path
    text: Path
    t5: Path | None = None
    clip: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()

    def of(self, part: str) -> Path:
        """Where that net lies, by the name of its folder in diffusers' layout."""
        own = {"transformer": self.flow, "vae": self.ae, "text_encoder": self.clip, "text_encoder_2": self.t5}
        return own[part] or self.text


def find_files(
    name: str,
    flow: str | None = None,
    ae: str | None = None,
    text: str | None = None,
    download: bool = True,
    t5: str | None = None,
    clip: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> ModelFiles:
    """The files of the model `name`; what is not on this machine is downloaded, with a progress bar.

    Each file is the one given here, else the one an environment variable names (`ModelSpec.env_flow`,
    `env_ae`), else the file of the transformer if that holds the other nets too, else the package's own or
    the hub's. All that is local is checked before anything is downloaded.

    Raises:
        InputError: a path that holds no such net, or a download that fails.
    """
    spec = get_spec(name)
    flow, ae = flow or _from_env(spec.env_flow), ae or _from_env(spec.env_ae)
    if flow and not ae and _has(Path(flow), "vae"):
        ae = flow
    if flow and not text:
        t5 = t5 or (flow if _has(Path(flow), "text_encoder_2") else None)
        clip = clip or (flow if _has(Path(flow), "text_encoder") else None)
        if all((Path(flow) / folder).is_dir() for folder in TEXT_FOLDERS):
            text = flow
    for path, part in ((flow, "transformer"), (ae, "vae"), (t5, "text_encoder_2"), (clip, "text_encoder")):
        if path:
            sources(open_checkpoint(Path(path), part), part, ())
    for path, _ in loras:
        lora.read_lora(Path(path))
    if text:
        _check_text_folder(Path(text), t5, clip)
    return ModelFiles(
        Path(flow) if flow else own_file(spec, spec.repo_flow, download),
        Path(ae) if ae else own_file(spec, spec.repo_ae, download),
        Path(text) if text else own_text_folder(spec, download, weights=not (t5 and clip)),
        Path(t5) if t5 else None,
        Path(clip) if clip else None,
        tuple((Path(path), weight) for path, weight in loras),
    )


def files_of(settings: ModelSettings, download: bool = True) -> ModelFiles:
    """The files that these settings name, as `find_files`."""
    return find_files(
        settings.model,
        settings.weights,
        settings.ae_weights,
        settings.text_encoders,
        download,
        settings.t5_weights,
        settings.clip_weights,
        [(entry.file, entry.weight) for entry in settings.lora],
    )


def _from_env(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _has(path: Path, part: str) -> bool:
    return (path / part).is_dir() if path.is_dir() else holds(open_checkpoint(path), part)


def _check_text_folder(folder: Path, t5: str | None, clip: str | None) -> None:
    missing = [name for name in TEXT_FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"Got {folder} for the text encoders, but it has no folder {' or '.join(missing)}")
    for encoder, given in (("text_encoder", clip), ("text_encoder_2", t5)):
        if not given:
            sources(open_checkpoint(folder / encoder), encoder, ())


def checkpoint_of(settings: ModelSettings) -> str | None:
    """Fingerprint of the transformer that these settings load, with what is added to it; None if a file is
    not on this machine.
    """
    try:
        files = files_of(settings, download=False)
        own, loras = fingerprint(files.flow), _all_loras(get_spec(settings.model), files)
        added = [f"{fingerprint(path, '')} {weight:g}" for path, weight in loras]
    except InputError:
        return None
    return hashlib.sha256("\n".join([own, *added]).encode()).hexdigest()[:32] if added else own


def read_weights(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a file in `dtype`, by the file's own names, 8-bit floats with their scales multiplied
    in.

    Raises:
        InputError: no whole file of weights.
    """
    return {name: weight.read(device).to(dtype) for name, weight in open_checkpoint(path).weights.items()}


# ---- from files to nets


def on_meta(net_class: type, params) -> nn.Module:
    """A net without memory of its own."""
    with torch.device("meta"):
        return net_class(params)


def fit(net: nn.Module, path: Path, part: str) -> dict[str, Source]:
    """How each tensor of a net is made of a file's. Reads the file's head only.

    Args:
        net: may lie on the meta device.
        part: "transformer", "vae", "text_encoder" (CLIP) or "text_encoder_2" (T5).

    Raises:
        InputError: names and shapes are not exactly those of the net; the message says what differs.
    """
    own = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    found, unexpected = sources(open_checkpoint(path, part), part, own)
    missing = sorted(own.keys() - found.keys())
    reshaped = [
        f"{name} {found[name].shape} instead of {own[name]}"
        for name in sorted(found)
        if found[name].shape != own[name]
    ]
    strange = [short(name) for name in unexpected]
    kinds = {"missing": missing, "unexpected": strange, "of another shape:": reshaped}
    problems = [
        f"{kind} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for kind, names in kinds.items()
        if names
    ]
    if problems:
        raise InputError(
            f"{path} is not this model's: {'; '.join(problems)}{_hint(missing, unexpected, reshaped, found)}"
        )
    return found


def _hint(missing: list[str], unexpected: list[str], reshaped: list[str], found: dict[str, Source]) -> str:
    """What the file may be instead."""
    differing = (*missing, *unexpected)
    if not reshaped and all("guidance_in." in name or "guidance_embedder." in name for name in differing):
        if missing:
            return "; it is a schnell file (no guidance_in), load it as flux-schnell"
        return "; it is a dev file (it has guidance_in), load it as flux-dev"
    columns = found["img_in.weight"].shape[-1:] if "img_in.weight" in found else ()
    if columns and columns[0] in CONTROL_INPUTS:
        return f"; it is {CONTROL_INPUTS[columns[0]]}, which is not known here"
    return ""


def fill(
    net: nn.Module, made: dict[str, Source], device: torch.device | str, dtype: torch.dtype, keep_8bit: bool
) -> nn.Module:
    """Gives a net on the meta device its tensors, one after the other, straight onto the device.

    Matrices in GGUF's blocks stay packed; with `keep_8bit` those of 8-bit floats do too.
    """
    for name, source in made.items():
        module, _, leaf = name.rpartition(".")
        owner = net.get_submodule(module)
        stays = source.is_packed and (keep_8bit or source.kind not in EIGHT_BIT)
        if leaf == "weight" and isinstance(owner, nn.Linear) and stays:
            packed, scale = source.read_packed(device)
            parent, _, own = module.rpartition(".")
            linear = PackedLinear(packed, source.kind, owner.bias, scale, dtype)
            setattr(net.get_submodule(parent), own, linear)
        else:
            setattr(owner, leaf, nn.Parameter(source.read(device, dtype), requires_grad=False))
    return net.eval().requires_grad_(False)


def load_net(
    net_class: type,
    params,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_8bit: bool = False,
) -> nn.Module:
    """A `Flux` or an `AutoEncoder` with the weights of a file."""
    net = on_meta(net_class, params)
    part = "transformer" if net_class is Flux else "vae"
    return fill(net, fit(net, path, part), device, dtype, keep_8bit)


# ---- the nets of a model


def _all_loras(spec: ModelSpec, files: ModelFiles) -> tuple[tuple[Path, float], ...]:
    """The differences to add to the file of the transformer: the model's own first, then those asked for."""
    if _own_lora(spec, files.flow) is None:
        return files.loras
    return ((own_file(spec, spec.lora, True), 1.0), *files.loras)


def _own_lora(spec: ModelSpec, flow: Path) -> str | None:
    """The difference that makes the model of another one's file; None if the file is the model itself."""
    if spec.lora is None:
        return None
    made, _ = sources(open_checkpoint(flow, "transformer"), "transformer", ["guidance_in.in_layer.weight"])
    return spec.lora if made else None


def check_files(spec: ModelSpec, files: ModelFiles) -> None:
    """Raises InputError if a file is not this model's, with nothing loaded but heads."""
    flow_on_meta(spec, files)
    fit(on_meta(AutoEncoder, spec.ae_params), files.ae, "vae")
    for part in ENCODERS:
        text_on_meta(files, part)


def flow_on_meta(spec: ModelSpec, files: ModelFiles) -> tuple[Flux, dict[str, Source], list[lora.Patch]]:
    """The transformer without memory, how its tensors are made, and what is then added to them."""
    # A model made by a difference is read as the one it is made of.
    params = replace(spec.params, guidance_embed=True) if _own_lora(spec, files.flow) else spec.params
    net = on_meta(Flux, params)
    made = fit(net, files.flow, "transformer")
    return net, made, _patches(_all_loras(spec, files), "transformer", net)


def _patches(loras: Sequence[tuple[Path, float]], part: str, net: nn.Module) -> list[lora.Patch]:
    shapes = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    read = (lora.read_lora(path, weight) for path, weight in loras)
    return [patch for each in read for patch in lora.match(each, part, shapes)]


def load_flow(
    spec: ModelSpec,
    files: ModelFiles,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_8bit: bool = False,
) -> Flux:
    """The transformer, with all differences in it or beside it.

    Args:
        keep_8bit: matrices of 8-bit floats stay as they are stored, and are expanded each time they are used.
    """
    net, made, patches = flow_on_meta(spec, files)
    fill(net, made, device, dtype, keep_8bit)
    lora.add(net, patches, dtype)
    if net.params.guidance_embed and not spec.params.guidance_embed:
        _fold_guidance(net, spec)
    return net


def _fold_guidance(net: Flux, spec: ModelSpec) -> None:
    """Makes one guidance scale part of the time embedder's last bias, and drops the input for it."""
    bias = net.time_in.out_layer.bias
    scale = torch.tensor([spec.guidance], device=bias.device)
    added = net.guidance_in.float()(timestep_embedding(scale, 256))[0]
    net.time_in.out_layer.bias = nn.Parameter((bias.float() + added).to(bias.dtype), requires_grad=False)
    net.guidance_in, net.params = nn.Identity(), spec.params


def text_on_meta(files: ModelFiles, part: str) -> tuple[nn.Module, dict[str, Source], list[lora.Patch]]:
    """As `flow_on_meta`, for a text encoder."""
    from transformers import AutoConfig, CLIPTextModel, T5EncoderModel

    folder = files.of(part)
    beside = folder / part if (folder / part).is_dir() else folder
    if not (beside / "config.json").is_file():
        beside = files.text / part
    if not (beside / "config.json").is_file():
        raise InputError(f"Got {beside}, which has no config.json: expected the folder of an encoder")
    json_of((beside / "config.json").read_bytes(), beside / "config.json")
    try:
        config = AutoConfig.from_pretrained(str(beside))
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"Got {beside}, whose config.json is no encoder's: fetch it again") from error
    # A CLIP checkpoint with its vision half says "clip", the text half alone "clip_text_model".
    net_class, kind = (CLIPTextModel, "clip") if part == "text_encoder" else (T5EncoderModel, "t5")
    if not config.model_type.startswith(kind):
        raise InputError(f"Got {beside}, an encoder of kind {config.model_type}; expected {TITLES[part]}")
    net = on_meta(net_class, config.text_config if config.model_type == "clip" else config)
    made = fit(net, folder, part)
    own = [(path, weight) for path, weight in files.loras if part in lora.parts(lora.read_lora(path))]
    return net, made, _patches(own, part, net)


def load_text(
    files: ModelFiles,
    part: str,
    max_length: int,
    device: torch.device | str,
    dtype: torch.dtype,
    keep_8bit: bool = False,
) -> HFEmbedder:
    """The encoder of that part, "text_encoder" (CLIP) or "text_encoder_2" (T5), and its tokenizer."""
    net, made, patches = text_on_meta(files, part)
    fill(net, made, device, dtype, keep_8bit)
    if part == "text_encoder_2":
        net.encoder.embed_tokens = net.shared
    for name, buffer in net.named_buffers():
        # The only buffer of either, not stored.
        module, _, leaf = name.rpartition(".")
        positions = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        net.get_submodule(module).register_buffer(leaf, positions, persistent=False)
    lora.add(net, patches, dtype)
    return HFEmbedder.around(net, max_length, str(files.text / ENCODERS[part]))


# ---- upstream's calls


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
    flow = Path(_from_env(spec.env_flow) or own_file(spec, spec.repo_flow, hf_download))
    return load_flow(spec, ModelFiles(flow, flow, flow), device, dtype)


def load_ae(
    name: str,
    device: str | torch.device = "cuda",
    hf_download: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AutoEncoder:
    """The autoencoder of the model `name`: upstream's call."""
    spec = get_spec(name)
    path = _from_env(spec.env_ae) or own_file(spec, spec.repo_ae, hf_download)
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
