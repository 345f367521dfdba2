"""LoRA files: what they change in which module, by the names that trainers give.

The formats of the changes are in `flux.weights.lora_formats`, how they are applied in
`flux.weights.lora_patches`.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flux.errors import InputError, warn
from flux.intervention import check_layers
from flux.model import Flux
from flux.modules.norms import RMSNorm
from flux.weights.checkpoint import Checkpoint
from flux.weights.headers import parse_json, read_json, short_name
from flux.weights.layouts import SWAPPED, Part, diffusers_modules
from flux.weights.lora_formats import LoraFields, LoraPlace, LowRank, Sum, WeightChange, read_finite
from flux.weights.lora_patches import BIASES, Patch, change_in, check_fields
from flux.weights.scales import ScaledTensor

# How a tensor's name ends, and its role for the module that the rest names.
ROLES = (
    (r"\.(?:lora_down|lora_A(?:\.[^.]+)?|lora_linear_layer\.down|lora\.down|down)\.weight", "down"),
    (r"\.(?:lora_up|lora_B(?:\.[^.]+)?|lora_linear_layer\.up|lora\.up|up)\.weight", "up"),
    (r"\.(?:lora_B(?:\.[^.]+)?|lora_up)\.bias", "bias"),
    (r"\.diff_b", "diff_b"),
    (r"\.alpha", "alpha"),
    (r"\.diff", "diff"),
    (r"\.set_weight|(?<=_norm)\.scale|(?<=\.norm_[qk])\.weight|(?<=\.norm_added_[qk])\.weight", "set"),
    (r"\.lora_magnitude_vector(?:\.[^.]+){0,2}", "magnitude"),
    (r"\.oft_R(?:\.[^.]+)?\.weight", "oft_R"),
    # The name is the role.
    (r"\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|dora_scale|oft_blocks(?:\.\d+)?|rescale)", None),
    (r"\.oft_R\.(scaled_oft)", None),
)
# Forms that are not known, each by a pattern that one of its tensors' names matches.
OTHER_FORMS = (
    (r"\.boft_[Rs]\b", "a BOFT"),
    (r"\.oft_(diag|r|s)\b", "an OFT of an early form"),
    (r"\.(lora_mid|lokr_t2|hada_t[12])\b", "a LoCon in Tucker's form"),
    (r"\.(ia3_l|vera_lambda_[bd]|hra_u)\b", "an adapter of PEFT's other than LoRA"),
)
EMBEDDING = "bundle_emb."  # a trained word that OneTrainer puts beside a LoRA
TEXT_PREFIXES: dict[Part, tuple[str, ...]] = {
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder.", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("lora_te2_", "lora_te3_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
}
# The matrices of text encoders that trainers change: a pattern of kohya's names, and our name.
TEXT_MODULES: dict[Part, tuple[str, str]] = {
    "text_encoder": (
        r"(?:text_model_)?encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc[12])",
        r"encoder.layers.\1.\2.\3",
    ),
    "text_encoder_2": (
        r"encoder_block_(\d+)_layer_([01])_(SelfAttention|DenseReluDense)_([qkvo]|wi_[01]|wo)",
        r"encoder.block.\1.layer.\2.\3.\4",
    ),
}
PREFIXES = (
    "base_model.model.", "transformer.", "unet.", "model.diffusion_model.", "diffusion_model.", "lora_unet_",
    "lora_transformer_", "lycoris_", "oft_unet_",
)  # fmt: skip
# XLabs has two names for the image's and the text's projections in each block.
XLABS = {
    r"double_blocks\.(\d+)\.img_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora1",
    r"double_blocks\.(\d+)\.txt_attn\.(qkv|proj)": r"double_blocks.\1.processor.\2_lora2",
    r"single_blocks\.(\d+)\.linear1": r"single_blocks.\1.processor.qkv_lora",
    r"single_blocks\.(\d+)\.linear2": r"single_blocks.\1.processor.proj_lora",
}


@dataclass(frozen=True)
class LoraFile:
    """One opened LoRA file and the strength it is applied with.

    Attributes:
        checkpoint: The file.
        strength: The user's factor of its changes.
        modules: The file's tensors by module, in the file's names, and by role.
        metadata: PEFT's configuration, if the file comes with one.
        layers: The layers that it changes; or by layer what its strength is multiplied by there, other layers
            having 1. If None, it changes all of its layers.
    """

    checkpoint: Checkpoint
    strength: float
    modules: dict[str, dict[str, ScaledTensor]]
    metadata: dict[str, Any]
    layers: Sequence[int] | Mapping[int, float] | None = None

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.checkpoint.path

    @property
    def parts(self) -> set[Part]:
        """The networks that the file changes."""
        return {part_of(module) for module in self.modules}

    def fingerprint(self) -> str:
        """Identify the file and how it is applied, see `Checkpoint.fingerprint`."""
        layers = "" if self.layers is None else f" {json.dumps(self.layers, sort_keys=True)}"
        return f"{self.checkpoint.fingerprint()} {self.strength:g}{layers}"

    def factor_in(self, layer: int | None) -> float:
        """The factor of the strength in a layer, or, for None, outside the layers."""
        if self.layers is None or layer is None:
            return 1.0
        if isinstance(self.layers, Mapping):
            return self.layers.get(layer, 1.0)
        return float(layer in self.layers)


def read_lora(
    checkpoint: Checkpoint,
    strength: float = 1.0,
    layers: Sequence[int] | Mapping[int, float] | None = None,
) -> LoraFile:
    """Sort a LoRA file's tensors by module and role. Reads none of them.

    Args:
        checkpoint: The file.
        strength: The factor of its changes.
        layers: See `LoraFile`.

    Raises:
        InputError: The checkpoint is no LoRA, or of a form that is not known.
    """
    path = checkpoint.path
    modules: dict[str, dict[str, ScaledTensor]] = {}
    unknown, embeddings = [], set[str]()
    for name, tensor in checkpoint.tensors.items():
        for sign, title in OTHER_FORMS:
            if re.search(sign, name):
                raise _other_form(path, title, name)
        if name.startswith(EMBEDDING):
            embeddings.add(name.split(".")[1])
            continue
        for ending, role in ROLES:
            if found := re.search(f"(?:{ending})$", name):
                fields = modules.setdefault(name[: found.start()].rstrip("_"), {})
                if (role or found[1]) in fields:
                    raise InputError(
                        f"Got {path}, with two adapters in one file ({short_name(name)}): save one "
                        "of them alone"
                    )
                fields[role or found[1]] = _as_matrix(tensor)
                if found[0].startswith(".oft_blocks") and len(tensor.shape) == 4:
                    raise _other_form(path, "a BOFT", name)
                break
        else:
            unknown.append(name)
    if unknown or not modules:
        raise _unmatched(path, unknown or ["none at all"])
    if embeddings:
        words = ", ".join(map(short_name, sorted(embeddings)))
        warn(f"{path}: the words {words}, trained with it, are left out")
    return LoraFile(checkpoint, strength, modules, _metadata(checkpoint), layers)


def _other_form(path: Path, title: str, name: str) -> InputError:
    return InputError(
        f"Got {path}, which is {title} ({short_name(name)}): not supported, take a LoRA, LoKr, LoHa, DoRA "
        "or OFT"
    )


def _as_matrix(tensor: ScaledTensor) -> ScaledTensor:
    """A 1x1 convolution without its two last axes; any other tensor as it is."""
    if len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
        return replace(tensor, stored=replace(tensor.stored, shape=tensor.shape[:2]))
    return tensor


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's configuration from the file's header, or from the JSON file beside it."""
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if text is not None:
        return parse_json(text, checkpoint.path)
    file = checkpoint.headers[0].path
    beside = file.with_name("adapter_config.json")
    if file.name == "adapter_model.safetensors" and os.path.isfile(beside):
        return {f"transformer.{key}": value for key, value in read_json(beside).items()}
    return {}


def _unmatched(path: Path, names: list[str]) -> InputError:
    some = ", ".join(map(short_name, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return InputError(
        f"Got {path}, with tensors that belong to no part of this model: {some}; it is for another model, or "
        "of a form not known here"
    )


# ---- from a file's names to the model's


def match_patches(files: Iterable[LoraFile], part: Part, model: nn.Module) -> list[Patch]:
    """Find what LoRA files change in one network.

    Args:
        files: The files, in the order in which they are applied.
        part: The network.
        model: It, with or without memory.

    Raises:
        InputError: A file has tensors that the network has no place for, or of another size; or it is asked
            for in layers that the network lacks.
    """
    places = _places(part, model)
    places |= {name.replace(".", "_"): place for name, place in places.items()}
    num_double, num_single = (
        len({name.split(".")[1] for name in places if name.startswith(f"{stack}_blocks.")})
        for stack in ("double", "single")
    )
    for file in files:
        if part == "transformer" and file.layers:
            check_layers(file.layers, num_double + num_single)
    return [patch for file in files for patch in _patches_of(file, part, model, places, num_double)]


def match_text_patches(file: LoraFile, part: Part) -> tuple[list[Patch], list[str]]:
    """Find the low-rank changes of a file to a text encoder by the file's names, without any model.

    Returns:
        These changes, and the modules, in the file's names, that are changed in another way.
    """
    pattern, ours = TEXT_MODULES[part]
    patches, others = [], []
    for module, fields in file.modules.items():
        if part_of(module) != part:
            continue
        prefix = next(prefix for prefix in TEXT_PREFIXES[part] if module.startswith(prefix))
        found = re.fullmatch(pattern, module[len(prefix) :].replace(".", "_"))
        change = _change_in(file, part, fields)
        if not found or not isinstance(change, LowRank) or not change.shape or fields.keys() & {*BIASES}:
            others.append(module)
            continue
        rows, columns = change.shape
        scale = _scale(file, module, part, fields, change.rank)
        place = LoraPlace(found.expand(ours), 0, rows, columns)
        patches.append(Patch(place, change, {}, file.strength, scale, module))
    return patches, others


def layer_of(module: str, num_double: int) -> int | None:
    """The layer that a module of the transformer belongs to; None if it is outside the layers.

    Args:
        module: Its name.
        num_double: The number of double-stream layers, which come first.
    """
    found = re.match(r"(double|single)_blocks\.(\d+)\.", module)
    return int(found[2]) + (num_double if found[1] == "single" else 0) if found else None


def _patches_of(
    file: LoraFile, part: Part, model: nn.Module, places: dict[str, LoraPlace], num_double: int
) -> list[Patch]:
    prefixes = TEXT_PREFIXES.get(part, PREFIXES)
    patches, unmatched = [], []
    for module, fields in file.modules.items():
        if part_of(module) != part:
            continue
        names = [module]
        for _ in range(2):  # up to two prefixes
            names += [name[len(prefix) :] for name in names for prefix in prefixes if name.startswith(prefix)]
        place = next((places[name] for name in names if name in places), None)
        if place is None:
            unmatched.append(module)
            continue
        change = _change_in(file, part, fields)
        if place.module == "img_in" and isinstance(change, Sum) and isinstance(model, Flux):
            place = _in_noise_channels(place, change, model)
        check_fields(file.path, place, fields, change)
        biases = {role: fields[role] for role in BIASES if role in fields}
        rank = None if change is None else change.rank
        scale = _scale(file, module, part, fields, rank) if rank else 1.0
        layer = layer_of(place.module, num_double) if part == "transformer" else None
        if factor := file.factor_in(layer):
            patches.append(Patch(place, change, biases, file.strength * factor, scale, module))
    if unmatched:
        raise _unmatched(file.path, unmatched)
    return patches


def _in_noise_channels(place: LoraPlace, change: Sum, model: Flux) -> LoraPlace:
    """The columns of the noise alone, if the change is a text-to-image model's: it knows no others."""
    noise = model.out_channels
    return replace(place, columns=noise) if change.shape == (place.rows, noise) else place


def part_of(module: str) -> Part:
    """The network that a LoRA file's module, in the file's names, belongs to."""
    for part, prefixes in TEXT_PREFIXES.items():
        if module.startswith(prefixes):
            return part
    return "transformer"


def _places(part: Part, model: nn.Module) -> dict[str, LoraPlace]:
    """Every name that files have for a module of ours, without prefix."""
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            places[name] = LoraPlace(name, 0, module.scale.shape[0], None)
            if part == "transformer":
                places[diffusers_modules(name)[0]] = places[name]
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        whole = LoraPlace(name, 0, rows, columns)
        places[name] = whole
        if part == "text_encoder":
            places[f"text_model.{name}"] = whole
        if part == "transformer":
            places |= _other_names(whole, columns)
    return places


def diffusers_places(module: str, rows: int, columns: int) -> dict[str, LoraPlace]:
    """The names that diffusers has for a linear layer of the transformer, or for parts of its rows.

    Args:
        module: The layer's name in our model.
        rows: The rows of its matrix.
        columns: The columns of its matrix.
    """
    places, start = {}, 0
    theirs = diffusers_modules(module)
    for index, their in enumerate(theirs):
        # Queries, keys and values have as many rows as the model has columns; the rest follows them.
        stop = start + columns if index < 3 and len(theirs) > 1 else rows
        places[their] = LoraPlace(module, start, stop, columns, module == SWAPPED)
        start = stop
    return places


def _other_names(whole: LoraPlace, columns: int) -> dict[str, LoraPlace]:
    """The names that other trainers have for a linear layer of the transformer, or for parts of its rows."""
    module = whole.module
    places = diffusers_places(module, whole.stop, columns)
    if len(places) > 1:  # OneTrainer numbers the parts
        places |= {f"{module}.{index}": place for index, place in enumerate(places.values())}
    for pattern, their in XLABS.items():
        if re.fullmatch(pattern, module):
            stop = 3 * columns if module.endswith("linear1") else whole.stop
            places[re.sub(pattern, their, module)] = LoraPlace(module, 0, stop, columns)
    return places


def _change_in(file: LoraFile, part: Part, fields: LoraFields) -> WeightChange | None:
    try:
        return change_in(fields, _config(file, part))
    except (TypeError, ValueError) as error:
        raise InputError(f"Got {file.path}, whose configuration cannot be read: fetch it again") from error


def _config(file: LoraFile, part: Part) -> dict[str, Any]:
    """PEFT's configuration for one network; empty if the file has none."""
    return {key.removeprefix(f"{part}."): value for key, value in file.metadata.items()}


def _scale(file: LoraFile, module: str, part: Part, fields: LoraFields, rank: int) -> float:
    """The factor alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    if "alpha" in fields:
        return float(read_finite(fields["alpha"], torch.device("cpu"))) / rank
    config = _config(file, part)
    try:
        special = (config.get("alpha_pattern") or {}).items()
        own = (value for key, value in special if re.search(rf"(^|\.){key}$", module))
        alpha = next(own, config.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(f"Got {file.path}, whose alpha and rank cannot be read: fetch it again") from error
