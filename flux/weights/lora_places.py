"""The modules of a model that a LoRA file changes, found by the names that trainers give them."""

import re
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from flux.intervention import check_layers
from flux.model import Flux
from flux.modules.norms import RMSNorm
from flux.weights.layouts import SWAPPED, Part, diffusers_modules
from flux.weights.lora import TEXT_PREFIXES, LoraFile, no_place, part_of
from flux.weights.lora_formats import LoraPlace, LowRank, Sum
from flux.weights.lora_patches import BIASES, Patch, check_fields

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
    for file in files:
        if isinstance(model, Flux) and file.layers:
            check_layers(file.layers, model.num_layers)
    return [patch for file in files for patch in _patches_of(file, part, model, places)]


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
        change = file.change(module)
        if not found or not isinstance(change, LowRank) or not change.shape or fields.keys() & {*BIASES}:
            others.append(module)
            continue
        rows, columns = change.shape
        scale = file.scale(module, change.rank)
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


def _patches_of(file: LoraFile, part: Part, model: nn.Module, places: dict[str, LoraPlace]) -> list[Patch]:
    """The changes of one file to a network whose modules have these names."""
    patches, unmatched = [], []
    for module, fields in file.modules.items():
        if part_of(module) != part:
            continue
        place = _place_of(module, part, places)
        if place is None:
            unmatched.append(module)
            continue
        change, layer = file.change(module), None
        if isinstance(model, Flux):
            layer = layer_of(place.module, len(model.double_blocks))
            if place.module == "img_in" and isinstance(change, Sum):
                place = _in_noise_channels(place, change, model)
        check_fields(file.path, place, fields, change)
        biases = {role: fields[role] for role in BIASES if role in fields}
        scale = file.scale(module, None if change is None else change.rank)
        if factor := file.factor_in(layer):
            patches.append(Patch(place, change, biases, file.strength * factor, scale, module))
    if unmatched:
        raise no_place(file.checkpoint, unmatched)
    return patches


def _place_of(module: str, part: Part, places: dict[str, LoraPlace]) -> LoraPlace | None:
    """The place of a file's module, whose name may have up to two prefixes. None if there is none."""
    prefixes, names = TEXT_PREFIXES.get(part, PREFIXES), [module]
    for _ in range(2):
        names += [name[len(prefix) :] for name in names for prefix in prefixes if name.startswith(prefix)]
    return next((places[name] for name in names if name in places), None)


def _in_noise_channels(place: LoraPlace, change: Sum, model: Flux) -> LoraPlace:
    """The columns of the noise alone, if the change is a text-to-image model's: it knows no others."""
    noise = model.out_channels
    return replace(place, columns=noise) if change.shape == (place.rows, noise) else place


# ---- names of places


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
