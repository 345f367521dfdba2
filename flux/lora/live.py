"""A LoRA beside a loaded transformer, with a strength for each layer that may change between two images.

Nothing is loaded again when a strength changes. Low-rank changes are a branch beside the layer's weights.
Changes of other forms keep a second, changed copy of the weights they change.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from flux.errors import InputError, warn
from flux.loaded_model import LoadedModel
from flux.model import Flux
from flux.modules.linear import AnyLinear, CustomLinear, can_project_rows, project_rows
from flux.modules.norms import RMSNorm
from flux.settings.demos import ModelSettings
from flux.weights.checkpoint import open_checkpoint
from flux.weights.find import find_model
from flux.weights.load import on_meta
from flux.weights.lora import LoraFile, read_lora
from flux.weights.lora_formats import LowRank
from flux.weights.lora_patches import Patch, apply_patches
from flux.weights.lora_places import layer_of, match_patches
from flux.weights.open_model import OpenModel


class BranchedLinear(CustomLinear):
    """A linear layer with a low-rank branch, and a bias of its own, times a strength.

    Args:
        base: The layer.
        down: First matrix of the branch, "rank in_features".
        up: Second matrix, "out_features rank".
        bias: The change to the bias, "out_features".
    """

    strength: Tensor  # a single number

    def __init__(self, base: AnyLinear, down: Tensor, up: Tensor, bias: Tensor):
        super().__init__()
        self.base = base
        self.down, self.up, self.added_bias = (nn.Parameter(x, requires_grad=False) for x in (down, up, bias))
        self.register_buffer("strength", torch.ones((), device=up.device))

    @property
    def weight(self) -> Tensor:
        """The layer's matrix with the branch added."""
        weight = self.base.weight
        return weight + (self.strength * (self.up @ self.down)).to(weight)

    @override
    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        branch = F.linear(F.linear(x, self.down), self.up[start:stop], self.added_bias[start:stop])
        return project_rows(self.base, x, start, stop) + self.strength.to(branch) * branch

    @override
    def can_project_rows(self) -> bool:
        return can_project_rows(self.base)


class BlendedLinear(CustomLinear):
    """A linear layer and a changed copy of it. The strength leads from one to the other.

    Args:
        base: The layer.
        changed: The copy.
    """

    strength: Tensor  # a single number

    def __init__(self, base: AnyLinear, changed: AnyLinear):
        super().__init__()
        self.base, self.changed = base, changed
        self.register_buffer("strength", torch.ones((), device=next(changed.parameters()).device))

    @property
    def weight(self) -> Tensor:
        """The matrix at this strength."""
        weight = self.base.weight
        return torch.lerp(weight, self.changed.weight, self.strength.to(weight))

    @override
    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        before, after = (project_rows(linear, x, start, stop) for linear in (self.base, self.changed))
        return torch.lerp(before, after, self.strength.to(before))

    @override
    def can_project_rows(self) -> bool:
        return can_project_rows(self.base) and can_project_rows(self.changed)


class LiveLora:
    """A LoRA beside a transformer, at strength 1 until `set_strength` says otherwise.

    Args:
        model: The transformer, its weights loaded and not yet moved, quantised or compiled.
        patches: The LoRA's changes to it.
        num_double: The number of double-stream layers, which come first.
        dtype: The dtype that the transformer computes in.

    Attributes:
        layers: The layers that the LoRA changes.
    """

    def __init__(self, model: Flux, patches: Sequence[Patch], num_double: int, dtype: torch.dtype):
        self._linears: dict[int | None, list[BranchedLinear | BlendedLinear]] = {}
        self._norms: dict[int | None, list[tuple[RMSNorm, Tensor, Tensor]]] = {}
        groups: dict[str, list[Patch]] = {}
        for patch in patches:
            groups.setdefault(patch.place.module, []).append(patch)
        for name, group in groups.items():
            layer, module = layer_of(name, num_double), model.get_submodule(name)
            if isinstance(module, RMSNorm):
                before, after = _changed(module, group, dtype)
                self._norms.setdefault(layer, []).append((module, before.scale, after.scale.clone()))
                continue
            linear = _beside(module, group, dtype)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linear)
            self._linears.setdefault(layer, []).append(linear)
        self.layers = sorted(layer for layer in {*self._linears, *self._norms} if layer is not None)
        self.set_strength(1.0)

    def set_strength(self, strength: float, layers: Mapping[int, float] | None = None) -> None:
        """Set how strong the LoRA is from the next pass on.

        Args:
            strength: The strength, 0 for the model as it was.
            layers: Other strengths, by layer.
        """
        with torch.inference_mode():
            for layer, linears in self._linears.items():
                for linear in linears:
                    linear.strength.fill_(_of_layer(layer, strength, layers))
            for layer, norms in self._norms.items():
                for norm, before, after in norms:
                    norm.scale.copy_(torch.lerp(before, after, _of_layer(layer, strength, layers)))


def _of_layer(layer: int | None, strength: float, layers: Mapping[int, float] | None) -> float:
    return strength if layer is None else (layers or {}).get(layer, strength)


def _beside(module: Any, patches: Sequence[Patch], dtype: torch.dtype) -> BranchedLinear | BlendedLinear:
    """The layer and its changes."""
    if not all(patch.change is None or isinstance(patch.change, LowRank) for patch in patches):
        return BlendedLinear(*_changed(module, patches, dtype))
    (rows, columns), device = module.weight.shape, next(module.parameters()).device
    downs, ups = [torch.zeros(0, columns, device=device)], [torch.zeros(rows, 0, device=device)]
    bias = torch.zeros(rows, device=device)
    for patch in patches:
        place = slice(patch.place.start, patch.place.stop)
        bias[place] += patch.bias(device)
        if isinstance(patch.change, LowRank):
            down, up = patch.change.factors(patch.place, patch.strength * patch.scale, device)
            whole = torch.zeros(rows, up.shape[1], device=device)
            whole[place] = up
            # A text-to-image model's LoRA changes the noise's columns alone, of a model that has more.
            downs.append(F.pad(down, (0, columns - down.shape[1])))
            ups.append(whole)
    return BranchedLinear(module, torch.cat(downs).to(dtype), torch.cat(ups, dim=1).to(dtype), bias.to(dtype))


def _changed(module: Any, patches: Sequence[Patch], dtype: torch.dtype) -> tuple[Any, Any]:
    """A module as it was, and as loading with these changes would make it."""
    before, holder = deepcopy(module), nn.Module()
    holder.add_module("changed", module)
    moved = [replace(patch, place=replace(patch.place, module="changed")) for patch in patches]
    apply_patches(holder, moved, dtype)
    return before, holder.get_submodule("changed")


# ---- loading


class LiveModel(OpenModel):
    """The opened files of one model, and a LoRA that is put beside its transformer.

    Changes of the LoRA to text encoders are left out.

    Args:
        model: The opened files. LoRAs among them are left out.
        lora: The LoRA.

    Attributes:
        live: The LoRA beside the transformer, once that is loaded.
    """

    live: LiveLora

    def __init__(self, model: OpenModel, lora: LoraFile):
        super().__init__(model.spec, replace(model.files, loras=()))
        self.lora = lora

    @cached_property
    def patches(self) -> list[Patch]:
        """The LoRA's changes to the transformer."""
        return match_patches([self.lora], "transformer", on_meta(Flux, self.spec.params))

    @override
    def check(self) -> None:
        super().check()
        if not self.patches:
            raise InputError(f"Got {self.lora.path}, which changes no layer of the transformer")
        if others := self.lora.parts - {"transformer"}:
            warn(f"{self.lora.path}: its changes to {' and '.join(sorted(others))} are left out")

    @override
    def load_transformer(
        self, device: torch.device | str, dtype: torch.dtype, keep_8bit: bool = False
    ) -> Flux:
        model = super().load_transformer(device, dtype, keep_8bit)
        self.live = LiveLora(model, self.patches, self.spec.params.depth, dtype)
        return model


def load_live(settings: ModelSettings) -> tuple[LoadedModel, LiveLora]:
    """Load a model and put the one LoRA that its settings name beside it.

    Args:
        settings: The model. The LoRA's weight is what strength 1 means.

    Returns:
        The model, and the LoRA, whose strength may change between two images.

    Raises:
        InputError: There is not exactly one LoRA, it does not fit the model, or as `LoadedModel.load`.
    """
    if len(settings.lora) != 1:
        raise InputError(f"Got {len(settings.lora)} LoRAs, expected one, whose layers are told apart")
    [lora] = settings.lora
    file = read_lora(open_checkpoint(Path(lora.file)), lora.weight, lora.layers)
    opened = LiveModel(find_model(settings), file)
    return LoadedModel.load(settings, opened=opened), opened.live
