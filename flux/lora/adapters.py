"""LoRA factors (arXiv 2106.09685) beside the linear layers of a transformer whose own weights are frozen.

Which matrices are trained is found from the model's sizes alone, before anything loads. Then each of them
gets a branch. Frozen weights that are packed, by a file or by quantisation, are expanded once in the forward
pass and once in the backward pass, and not kept in between.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flux.errors import InputError
from flux.model import Flux, FluxParams
from flux.modules.linear import AnyLinear, CustomLinear, can_project_rows, project_rows
from flux.runtime.offload import StreamedBlock
from flux.weights.load import on_meta
from flux.weights.lora_places import diffusers_places

ATTENTION = r"(img|txt)_attn\.(qkv|proj)"
MLP = r"(img|txt)_mlp\.[02]"

# ---- what is trained


@dataclass(frozen=True)
class Target:
    """Rows of a matrix that get a LoRA.

    Attributes:
        module: The name of the linear layer in `Flux`.
        layer: The number of its layer.
        start: The first row.
        stop: The row after the last one.
        rows: All rows of the matrix.
        columns: Its columns.
        rank: The rank of the LoRA.
        alpha: Its scale times the rank.
    """

    module: str
    layer: int
    start: int
    stop: int
    rows: int
    columns: int
    rank: int
    alpha: float

    @property
    def parameters(self) -> int:
        """The numbers in both factors."""
        return self.rank * (self.columns + self.stop - self.start)

    def in_diffusers(self) -> Iterator[tuple[str, slice]]:
        """Yield the modules of diffusers that the rows belong to, each with its rows of the up factor."""
        for their, place in diffusers_places(self.module, self.rows, self.columns).items():
            if self.start <= place.start and place.stop <= self.stop:
                yield their, slice(place.start - self.start, place.stop - self.start)


def find_targets(
    params: FluxParams,
    layers: Collection[int],
    parts: Collection[str],
    rank: int | Mapping[int, int],
    alpha: float | None,
) -> list[Target]:
    """Find the matrices to train, in the order of the layers.

    In a single-stream block, the first rows of `linear1` belong to attention and the others to the MLP;
    `linear2`, which projects both back, is trained with either.

    Args:
        params: The sizes of the model.
        layers: The layers.
        parts: "attention", "mlp" or both.
        rank: The rank, of all layers or of each.
        alpha: The scale times the rank. If None, the rank.

    Raises:
        InputError: `rank` lacks one of the layers, or names one that is not trained.
    """
    ranks = dict.fromkeys(layers, rank) if isinstance(rank, int) else rank
    if missing := sorted(set(layers) - ranks.keys()):
        raise InputError(f"Got no rank for layers {missing}, which are trained: give one for each layer")
    if useless := sorted(ranks.keys() - set(layers)):
        raise InputError(f"Got a rank for layers {useless}, which are not trained: leave it out")
    model, targets = on_meta(Flux, params), []
    for layer, block in enumerate(model.blocks):
        if layer not in ranks:
            continue
        stack, index = ("double", layer) if layer < params.depth else ("single", layer - params.depth)
        scale = ranks[layer], float(alpha or ranks[layer])
        for name, linear in block.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            if rows := _trained_rows(name, linear.out_features, params.hidden_size, parts):
                module = f"{stack}_blocks.{index}.{name}"
                sizes = linear.out_features, linear.in_features
                targets.append(Target(module, layer, rows.start, rows.stop, *sizes, *scale))
    if not targets:
        raise InputError("Got no layer to train: name one of the model's layers")
    return targets


def _trained_rows(name: str, rows: int, width: int, parts: Collection[str]) -> range:
    """Those of the rows of a block's linear layer that belong to these parts."""
    if name == "linear1":
        start = 0 if "attention" in parts else 3 * width
        return range(start, rows if "mlp" in parts else 3 * width)
    if name == "linear2":
        return range(rows)
    pattern = "|".join(regex for part, regex in (("attention", ATTENTION), ("mlp", MLP)) if part in parts)
    return range(rows if re.fullmatch(pattern, name) else 0)


# ---- how it is trained


class LoraLinear(CustomLinear):
    """A frozen linear layer with a LoRA beside it: base(x) + alpha / rank * up @ down @ x.

    Args:
        base: The layer.
        target: Which of its rows are trained, and the rank.
        down: First factor, "rank columns", in float32.
    """

    def __init__(self, base: AnyLinear, target: Target, down: Tensor):
        super().__init__()
        self.base, self.target = base, target
        self.scale = target.alpha / target.rank
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(down.new_zeros(target.stop - target.start, target.rank))

    @property
    def weight(self) -> Tensor:
        """The layer's matrix with the LoRA added."""
        weight = self.base.weight
        return weight + (self.scale * self._whole_up() @ self.down).to(weight)

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        up = self._whole_up()[start:stop].to(x.dtype)
        branch = F.linear(F.linear(x, self.down.to(x.dtype)), up)
        return project_rows(self.base, x, start, stop) + self.scale * branch

    def _whole_up(self) -> Tensor:
        """The second factor for all rows: zero where they are not trained."""
        target = self.target
        if target.stop - target.start == target.rows:
            return self.up
        return F.pad(self.up, (0, 0, target.start, target.rows - target.stop))

    def can_project_rows(self) -> bool:
        """Return whether the base can do it."""
        return can_project_rows(self.base)


class FrozenLinear(CustomLinear):
    """A packed linear layer that lets gradients through.

    Its weights are expanded in the forward pass, and again in the backward pass. Roundings of the input, as
    layers in 8-bit floats make them, count as if they changed nothing.
    """

    def __init__(self, base: CustomLinear):
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The whole matrix, expanded."""
        return self.base.weight

    def project(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Compute only the output channels start..stop."""
        return _ThroughFrozen.apply(x, self.base, start, stop)  # pyright: ignore[reportReturnType]

    def can_project_rows(self) -> bool:
        """Return whether the base can do it."""
        return can_project_rows(self.base)


class _ThroughFrozen(torch.autograd.Function):
    """y = x @ W.T and dx = dy @ W, where W is expanded from its packed form each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: CustomLinear, start: int, stop: int | None) -> Tensor:
        ctx.linear, ctx.rows = linear, slice(start, stop)
        return project_rows(linear, x, start, stop)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        return grad @ ctx.linear.weight[ctx.rows].to(grad.dtype), None, None, None


def add_adapters(
    model: Flux, targets: Collection[Target], seed: int, device: torch.device | str
) -> dict[str, LoraLinear]:
    """Put a LoRA beside each target, in place; the model then computes what it did before.

    Args:
        model: The model. Blocks that are streamed may have been wrapped already.
        targets: The trained matrices.
        seed: Seed of the first factors. The second ones are zero.
        device: Where the factors are put.

    Returns:
        The new layers, by the names of the modules whose places they take.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for target in targets:
        down = torch.empty(target.rank, target.columns)
        # The usual start: uniform within 1 / sqrt(columns).
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        path = target.module.split(".", 2)[2]
        parent, _, leaf = path.rpartition(".")
        owner = _block(model, target.layer).get_submodule(parent)
        base: Any = owner.get_submodule(leaf)
        adapters[target.module] = LoraLinear(base, target, down.to(device))
        setattr(owner, leaf, adapters[target.module])
    first = min(target.layer for target in targets)
    for layer in range(first, model.num_layers):
        _let_gradients_through(_block(model, layer))
    return adapters


def _let_gradients_through(block: nn.Module) -> None:
    """Wrap the packed layers of a block, those inside a `LoraLinear` too."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CustomLinear) and not isinstance(child, LoraLinear):
                setattr(parent, name, FrozenLinear(child))


def _block(model: Flux, layer: int) -> nn.Module:
    block = model.blocks[layer]
    return block.block if isinstance(block, StreamedBlock) else block


def prepare_backward(
    model: Flux,
    first: int,
    checkpointing: bool,
    repeated_in: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Spare the backward pass: nothing is recorded before the first trained layer, nor within later ones.

    Args:
        model: The model.
        first: The first trained layer.
        checkpointing: Whether activations inside the later layers are computed again in the backward pass.
            Otherwise they are kept.
        repeated_in: Makes the context in which they are computed again, since modes of torch end before the
            backward pass.
    """
    # Nothing in a block is random.
    again = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), repeated_in()),
    )
    blocks: list[Any] = [*model.blocks]  # whose `run` a compiler may replace, and so do we
    for layer, block in enumerate(blocks):
        if layer < first:
            block.run = torch.no_grad()(block.run)
        elif checkpointing:
            block.run = partial(again, block.run)
