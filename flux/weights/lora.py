"""LoRA files: their tensors by module and role, by the names that trainers give.

`flux.weights.lora_places` finds which modules of a model they change, `flux.weights.lora_formats` knows the
formats of the changes, and `flux.weights.lora_patches` applies them.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flux.errors import InputError, warn
from flux.weights.checkpoint import Checkpoint
from flux.weights.headers import parse_json, read_json, short_name
from flux.weights.identify import declared_model, describe_checkpoint, holds_part, model_of_lora
from flux.weights.layouts import LAYOUTS, Part
from flux.weights.lora_formats import WeightChange, read_finite
from flux.weights.lora_patches import change_in
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


@dataclass(frozen=True)
class LoraFile:
    """One opened LoRA file and the strength it is applied with.

    Attributes:
        checkpoint: The file.
        strength: The user's factor of its changes.
        modules: The file's tensors by module, in the file's names, and by role.
        peft_config: PEFT's configuration, empty if the file comes with none. Keys begin with the network's
            name: "transformer.lora_alpha".
        layers: The layers that it changes; or by layer what its strength is multiplied by there, other layers
            having 1. If None, it changes all of its layers.
    """

    checkpoint: Checkpoint
    strength: float
    modules: dict[str, dict[str, ScaledTensor]]
    peft_config: dict[str, Any]
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

    def change(self, module: str) -> WeightChange | None:
        """The change to the weight of a module, in the file's names. None if the file has none for it.

        Raises:
            InputError: PEFT's configuration cannot be read.
        """
        try:
            return change_in(self.modules[module], self._config_of(module))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Got {self.path}, whose configuration cannot be read: fetch it again"
            ) from error

    def scale(self, module: str, rank: int | None) -> float:
        """The factor alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732).

        Args:
            module: The module, in the file's names.
            rank: The rank of its change. If None, the format has no rank, and the factor is 1.

        Raises:
            InputError: The factor cannot be read.
        """
        if not rank:
            return 1.0
        if "alpha" in self.modules[module]:
            return float(read_finite(self.modules[module]["alpha"], torch.device("cpu"))) / rank
        config = self._config_of(module)
        try:
            special = (config.get("alpha_pattern") or {}).items()
            own = (value for key, value in special if re.search(rf"(^|\.){key}$", module))
            alpha = next(own, config.get("lora_alpha"))
            if alpha is None:
                return 1.0
            return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise InputError(
                f"Got {self.path}, whose alpha and rank cannot be read: fetch it again"
            ) from error

    def _config_of(self, module: str) -> dict[str, Any]:
        """PEFT's configuration for a module's network; empty if the file has none."""
        prefix = f"{part_of(module)}."
        return {key.removeprefix(prefix): value for key, value in self.peft_config.items()}


def part_of(module: str) -> Part:
    """The network that a LoRA file's module, in the file's names, belongs to."""
    for part, prefixes in TEXT_PREFIXES.items():
        if module.startswith(prefixes):
            return part
    return "transformer"


# ---- reading


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
    if any(holds_part(checkpoint, part) for part in LAYOUTS):
        raise InputError(f"Got {path}, which is {describe_checkpoint(checkpoint)}; expected a LoRA")
    modules: dict[str, dict[str, ScaledTensor]] = {}
    unknown, words = [], set[str]()
    for name, tensor in checkpoint.tensors.items():
        _refuse_other_form(path, name, tensor)
        found = _module_and_role(name)
        if name.startswith(EMBEDDING):
            words.add(name.split(".")[1])
        elif found is None:
            unknown.append(name)
        else:
            module, role = found
            fields = modules.setdefault(module, {})
            if role in fields:
                raise InputError(
                    f"Got {path}, with two adapters in one file ({short_name(name)}): save one of them alone"
                )
            fields[role] = _as_matrix(tensor)
    if unknown or not modules:
        raise no_place(checkpoint, unknown or ["none at all"])
    if words:
        named = ", ".join(map(short_name, sorted(words)))
        warn(f"{path}: the words {named}, trained with it, are left out")
    return LoraFile(checkpoint, strength, modules, _peft_config(checkpoint), layers)


def _module_and_role(name: str) -> tuple[str, str] | None:
    """The module that a tensor is for, in the file's names, and its role. None if the name has no role."""
    for ending, role in ROLES:
        if found := re.search(f"(?:{ending})$", name):
            return name[: found.start()].rstrip("_"), role or found[1]
    return None


def _refuse_other_form(path: Path, name: str, tensor: ScaledTensor) -> None:
    """Raise an `InputError` if this tensor belongs to a form of adapters that is not known."""
    title = next((title for sign, title in OTHER_FORMS if re.search(sign, name)), None)
    if re.search(r"\.oft_blocks(\.\d+)?$", name) and len(tensor.shape) == 4:
        title = "a BOFT"
    if title is not None:
        raise InputError(
            f"Got {path}, which is {title} ({short_name(name)}): not supported, take a LoRA, LoKr, LoHa, "
            "DoRA or OFT"
        )


def no_place(checkpoint: Checkpoint, names: list[str]) -> InputError:
    """The error for a LoRA file with tensors or modules of these names, for which a model has no place."""
    some = ", ".join(map(short_name, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if other := model_of_lora(names):
        why = f"it is a LoRA for {other}, take one for FLUX.1"
    else:
        why = f"it is for another model, or of a form not known here{declared_model(checkpoint)}"
    return InputError(
        f"Got {checkpoint.path}, with tensors that belong to no part of this model: {some}; {why}"
    )


def _as_matrix(tensor: ScaledTensor) -> ScaledTensor:
    """A 1x1 convolution without its two last axes; any other tensor as it is."""
    if len(tensor.shape) == 4 and tensor.shape[2:] == (1, 1):
        return replace(tensor, stored=replace(tensor.stored, shape=tensor.shape[:2]))
    return tensor


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's configuration from the file's header, or from the JSON file beside it."""
    text = checkpoint.metadata.get("lora_adapter_metadata")
    if text is not None:
        return parse_json(text, checkpoint.path)
    file = checkpoint.headers[0].path
    beside = file.with_name("adapter_config.json")
    if file.name == "adapter_model.safetensors" and os.path.isfile(beside):
        return {f"transformer.{key}": value for key, value in read_json(beside).items()}
    return {}
