"""How large a LoRA's changes are: Frobenius norms, from the factors alone where the form allows it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from flux.lora.contents import OpenLora, by_layer
from flux.model import Flux
from flux.weights.checkpoint import Checkpoint
from flux.weights.load import match_names, on_meta
from flux.weights.lora_formats import LoHa, LoKr, LowRank, Sum
from flux.weights.lora_patches import Patch
from flux.weights.lora_places import layer_of
from flux.weights.sources import TensorSource, find_sources

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerChange:
    """A LoRA's change of one layer, or of the weights outside the layers.

    Attributes:
        layer: The layer's number, or None.
        matrices: How many modules it changes, or parts of them that the file has apart.
        ranks: The ranks of its changes, each once.
        alphas: Alpha, the scale times the rank, of its changes, each once.
        norm: The Frobenius norm of its changes to weights, at strength 1. None if it is not known without the
            model's weights.
        relative: The same divided by the norm of all the layer's weights. None if these are not there.
    """

    layer: int | None
    matrices: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    norm: float | None
    relative: float | None = None

    @property
    def size(self) -> float | None:
        """The relative norm, or else the norm."""
        return self.norm if self.relative is None else self.relative


def layer_changes(
    lora: OpenLora, base: Checkpoint | None = None, progress: bool = False
) -> list[LayerChange]:
    """Measure a LoRA's change to each layer, by rising number; that outside the layers comes last.

    Args:
        lora: The LoRA.
        base: The weights that it was made for. Without them, changes that depend on them, such as DoRA's,
            have no norm.
        progress: Whether to show a progress bar.

    Raises:
        InputError: The weights are another model's, or a file cannot be read.
    """
    sources = {} if base is None else _matrices(base, lora)
    layers = tqdm(by_layer(lora).items(), "norms", unit="layer", disable=not progress)
    return [_layer_change(lora, layer, patches, sources) for layer, patches in layers]


def _layer_change(
    lora: OpenLora, layer: int | None, patches: Sequence[Patch], sources: Mapping[str, TensorSource]
) -> LayerChange:
    changed = [patch.place.module for patch in patches]
    in_layer = [module for module in sources if layer_of(module, lora.params.depth) == layer]
    squares, of_base = [], 0.0
    for module in dict.fromkeys([*in_layer, *changed]):
        weight = sources[module].read(CPU, torch.float32) if module in sources else None
        of_base += 0.0 if weight is None else _squares(weight)
        squares += [squared_norm(patch, weight) for patch in patches if patch.place.module == module]
    known = [each for each in squares if each is not None]
    norm = math.sqrt(sum(known)) if len(known) == len(squares) else None
    ranked = [(patch.change.rank, patch.scale) for patch in patches if patch.change and patch.change.rank]
    return LayerChange(
        layer,
        len(patches),
        tuple(sorted({rank for rank, _ in ranked})),
        tuple(sorted({round(rank * scale, 4) for rank, scale in ranked})),
        norm,
        norm / math.sqrt(of_base) if norm is not None and of_base else None,
    )


def _matrices(base: Checkpoint, lora: OpenLora) -> dict[str, TensorSource]:
    """All weights of a model's linear layers and norms, by module."""
    takes_guidance, _ = find_sources(base, "transformer", ["guidance_in.in_layer.weight"])
    model = on_meta(Flux, replace(lora.params, guidance_embed=bool(takes_guidance)))
    sources = match_names(model, base, "transformer")
    weights = {name: source for name, source in sources.items() if not name.endswith(".bias")}
    return {name.rpartition(".")[0]: source for name, source in weights.items()}


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def squared_norm(patch: Patch, weight: Tensor | None = None) -> float | None:
    """The squared Frobenius norm of a change to a weight.

    Args:
        patch: The change.
        weight: The module's weight in float32. If None, the norm of a change that depends on it is unknown.

    Returns:
        The number, or None if it is unknown. 0 if only the bias is changed.
    """
    change, factor = patch.change, patch.strength * patch.scale
    if change is None:
        return 0.0
    if isinstance(change, LowRank):
        # |U D|^2 is the sum of (U^T U) * (D D^T): the product, of the weight's size, is never made.
        down, up = (x.double() for x in change.factors(patch.place, factor, CPU))
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
    if isinstance(change, LoKr) and not isinstance(change, LoHa):
        return factor**2 * _squares(change.first.read(CPU)) * _squares(change.second.read(CPU))
    if isinstance(change, Sum):
        return _squares(change.matrix(patch.place, factor, CPU))
    if weight is None:
        return None
    rows = weight[patch.place.start : patch.place.stop]
    return _squares(change.changed(rows.clone(), patch.place, patch.strength, patch.scale) - rows)
