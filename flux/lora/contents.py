"""The contents of a LoRA file: the model it is for, its form and trainer, and its change to each layer.

Headers say most of it. Only the norms of the changes need the file's tensors, and no model's weights.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flux.errors import InputError
from flux.model import Flux, FluxParams
from flux.specs import configs
from flux.weights.checkpoint import open_checkpoint
from flux.weights.layouts import Part
from flux.weights.load import on_meta
from flux.weights.lora import LoraFile, part_of, read_lora
from flux.weights.lora_formats import Difference, DoRA, LoHa, LoKr, LowRank, Replacement
from flux.weights.lora_patches import Patch
from flux.weights.lora_places import layer_of, match_patches
from flux.weights.lora_rotations import InputRotation, OutputRotation

FORMS = {
    LowRank: "LoRA",
    LoHa: "LoHa",
    LoKr: "LoKr",
    Difference: "whole differences",
    DoRA: "DoRA",
    InputRotation: "OFT",
    OutputRotation: "OFT",
    Replacement: "replaced norms",
}
# By a pattern that one of the modules' names matches: whose names they are.
NAMES = (
    (r"^lycoris_", "LyCORIS"),
    (r"^lora_transformer_", "OneTrainer"),
    (r"^lora_unet_(double|single)_blocks_", "kohya"),
    (r"\.processor\.", "XLabs"),
    (r"^(lora_unet_|oft_unet_)", "kohya, on diffusers' names"),
    (r"^(base_model\.model\.)?(transformer\.|unet\.)?(single_)?transformer_blocks\.", "diffusers"),
    (r"^(model\.)?diffusion_model\.", "ComfyUI"),
    (r"^base_model\.model\.", "PEFT, on BFL's names"),
    (r"^(double|single)_blocks\.", "BFL"),
)
# By an entry of the file's metadata: which trainer writes it.
TRAINERS = {
    "ot_revision": "OneTrainer",
    "ot_branch": "OneTrainer",
    "ss_network_module": "kohya sd-scripts, or a trainer built on it",
    "lora_adapter_metadata": "diffusers, or a trainer that saves through it",
}
# Entries of the metadata that tell a reader what the file is for.
TELLING = (
    "modelspec.title", "modelspec.architecture", "modelspec.trigger_phrase", "modelspec.author",
    "modelspec.license", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_steps", "ss_num_train_images", "ss_learning_rate", "base_model", "trigger_word",
)  # fmt: skip
LONGEST_ENTRY = 100  # letters


@dataclass(frozen=True, eq=False)
class OpenLora:
    """A LoRA file whose changes have been matched with a transformer's modules. No tensor has been read.

    Attributes:
        file: The file.
        models: The models of this package that it fits.
        params: Their sizes.
        patches: Its changes to the transformer, one for each module or part of one.
    """

    file: LoraFile
    models: tuple[str, ...]
    params: FluxParams
    patches: tuple[Patch, ...]

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self.file.path

    @property
    def num_layers(self) -> int:
        """The number of the model's layers."""
        return self.params.depth + self.params.depth_single_blocks

    @property
    def vital_layers(self) -> tuple[int, ...]:
        """The known vital layers of the first model that it fits; empty if nobody has published any."""
        return configs[self.models[0]].vital_layers or ()

    @property
    def layers(self) -> list[int]:
        """The layers that it changes."""
        return sorted({layer for patch in self.patches if (layer := self.layer_of(patch)) is not None})

    def layer_of(self, patch: Patch) -> int | None:
        """The layer that a change is in, or None if it is outside the layers."""
        return layer_of(patch.place.module, self.params.depth)

    @property
    def form(self) -> str:
        """The forms of its changes, "LoRA", "LoKr, DoRA of LoKr", ..."""
        return ", ".join(dict.fromkeys(_form(patch) for patch in self.patches))

    @property
    def names(self) -> str:
        """Whose names its modules have."""
        modules = list(self.file.modules)
        found = (title for sign, title in NAMES if any(re.search(sign, module) for module in modules))
        return next(found, "of its own")

    @property
    def trainer(self) -> str | None:
        """The program that made it, as far as the file says."""
        metadata = self.file.checkpoint.metadata
        software = _parsed(metadata.get("software"))
        if isinstance(software, str):
            return software[:LONGEST_ENTRY]
        if isinstance(software, dict) and isinstance(software.get("name"), str):
            return " ".join(str(software[key])[:40] for key in ("name", "version") if key in software)
        found = (title for key, title in TRAINERS.items() if key in metadata)
        return next(found, "XLabs x-flux" if self.names == "XLabs" else None)

    @property
    def text_encoders(self) -> dict[Part, int]:
        """How many modules of each text encoder it changes."""
        parts = list(map(part_of, self.file.modules))
        return {part: parts.count(part) for part in ("text_encoder", "text_encoder_2") if part in parts}

    def telling_metadata(self) -> dict[str, str]:
        """Those entries of its metadata that tell what it is for."""
        metadata = self.file.checkpoint.metadata
        return {key: metadata[key][:LONGEST_ENTRY] for key in TELLING if metadata.get(key)}


def open_lora(path: str | Path, strength: float = 1.0) -> OpenLora:
    """Open a LoRA file and find the models that it fits. Reads its header only.

    Args:
        path: The file, or a folder that holds one.
        strength: The factor of its changes.

    Raises:
        InputError: It is no LoRA, of a form that is not known, or for a model that is not known here.
    """
    checkpoint = open_checkpoint(Path(path))
    file = read_lora(checkpoint, strength)
    if file.parts.isdisjoint({"transformer"}):
        raise InputError(f"Got {path}, a LoRA of text encoders alone, which has no layers of a transformer")
    sides = {side for fields in file.modules.values() for tensor in fields.values() for side in tensor.shape}
    errors: list[InputError] = []
    # Of models that it does not fit, the error is that of one whose width it has.
    for params in sorted(_sizes(), key=lambda params: params.hidden_size not in sides):
        try:
            patches = match_patches([file], "transformer", on_meta(Flux, params))
        except InputError as error:
            errors.append(error)
            continue
        models = tuple(name for name, spec in configs.items() if _with_guidance(spec.params) == params)
        return OpenLora(file, models, params, tuple(patches))
    raise errors[0]


def _sizes() -> list[FluxParams]:
    """The sizes of all models, each once, with the guidance input that some of them lack."""
    found: list[FluxParams] = []
    for spec in configs.values():
        if (params := _with_guidance(spec.params)) not in found:
            found.append(params)
    return found


def _with_guidance(params: FluxParams) -> FluxParams:
    return replace(params, guidance_embed=True)


def open_loras(paths: Sequence[str | Path]) -> list[OpenLora]:
    """Open several LoRA files for models of the same sizes.

    Raises:
        InputError: As `open_lora`, or they are for models of different sizes.
    """
    opened = [open_lora(path) for path in paths]
    for other in opened[1:]:
        if other.params != opened[0].params:
            raise InputError(
                f"Got {opened[0].path}, a LoRA for {opened[0].models[0]}, and {other.path}, one for "
                f"{other.models[0]}: give LoRAs for one model"
            )
    return opened


def _form(patch: Patch) -> str:
    if patch.change is None:
        return "biases"
    title = FORMS[type(patch.change)]
    return f"DoRA of {FORMS[type(patch.change.direction)]}" if isinstance(patch.change, DoRA) else title


def _parsed(text: str | None) -> Any:
    """The value of a JSON text, or a text that is none as it is."""
    try:
        return json.loads(text or "null")
    except (ValueError, RecursionError):
        return text


def layer_name(layer: int | None, num_double: int) -> str:
    """The name of a layer in other programs: "double 0", "single 7"; "outside" for None."""
    if layer is None:
        return "outside"
    return f"double {layer}" if layer < num_double else f"single {layer - num_double}"


def by_layer(lora: OpenLora) -> dict[int | None, list[Patch]]:
    """A LoRA's changes by rising number of their layer, those outside the layers last, under None."""
    groups: dict[int | None, list[Patch]] = {}
    for patch in lora.patches:
        groups.setdefault(lora.layer_of(patch), []).append(patch)
    return dict(sorted(groups.items(), key=lambda item: lora.num_layers if item[0] is None else item[0]))
