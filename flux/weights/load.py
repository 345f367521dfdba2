"""From a model's name to its nets: find the files, read them strictly, put them on a device."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.errors import InputError
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.modules.conditioner import HFEmbedder
from flux.modules.layers import timestep_embedding
from flux.modules.linear import PackedLinear
from flux.specs import ModelSpec
from flux.weights import lora
from flux.weights.checkpoint import EIGHT_BIT, json_of, open_checkpoint, short
from flux.weights.find import ENCODERS, ModelFiles, all_loras, own_lora
from flux.weights.layouts import TITLES, Source, sources

CONTROL_INPUTS = {128: "a canny or depth model", 384: "a fill model"}


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


def check_files(spec: ModelSpec, files: ModelFiles) -> None:
    """Raises InputError if a file is not this model's, with nothing loaded but heads."""
    flow_on_meta(spec, files)
    fit(on_meta(AutoEncoder, spec.ae_params), files.ae, "vae")
    for part in ENCODERS:
        text_on_meta(files, part)


def flow_on_meta(spec: ModelSpec, files: ModelFiles) -> tuple[Flux, dict[str, Source], list[lora.Patch]]:
    """The transformer without memory, how its tensors are made, and what is then added to them."""
    # A model made by a difference is read as the one it is made of.
    params = replace(spec.params, guidance_embed=True) if own_lora(spec, files.flow) else spec.params
    net = on_meta(Flux, params)
    made = fit(net, files.flow, "transformer")
    return net, made, _patches(all_loras(spec, files), "transformer", net)


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
