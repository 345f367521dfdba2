"""The bytes of a model's weights on the device, counted from the shapes in its files' headers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from flux.model import Flux, FluxParams
from flux.modules.float8 import EIGHT_BIT_FLOATS
from flux.modules.linear import PackedLinear
from flux.runtime.offload import evenly_spaced
from flux.runtime.quantize import quantize_linears, quantized_bytes, to_fp8
from flux.weights.sources import TensorSource

BLOCK = r"(double_blocks|single_blocks|encoder\.block)\.(\d+)\."


@dataclass(frozen=True)
class ModuleSize:
    """The bytes of a model's weights.

    Attributes:
        blocks: Bytes of each block, in the order in which they compute.
        rest: Bytes of all other weights.
    """

    blocks: tuple[int, ...]
    rest: int

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return sum(self.blocks) + self.rest

    def on_device(self, streamed: int) -> int:
        """Bytes on the device while `streamed` blocks are streamed: the other weights and two buffers."""
        if not streamed:
            return self.total
        chosen = [self.blocks[number] for number in evenly_spaced(streamed, len(self.blocks))]
        return self.total - sum(chosen) + 2 * max(chosen)


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored on the device. Matrices that a file packs stay packed, others have `dtype`.

    Attributes:
        dtype: Type of all numbers that are not packed.
        bits: Bits per weight of the matrices inside blocks. With 8, a file's 8-bit floats stay packed too.
        fp8: Whether the 8 bits are floats. Modulations then keep `dtype`.
    """

    dtype: torch.dtype
    bits: int = 16
    fp8: bool = False

    def keeps_packed(self, source: TensorSource) -> bool:
        """Return whether a matrix stays as its file packs it."""
        return source.is_packed and (self.bits == 8 or source.kind not in EIGHT_BIT_FLOATS)

    def nbytes(self, source: TensorSource, quantized: bool, rank: int | None = 0) -> int:
        """Return the bytes of one tensor.

        Args:
            source: Where it comes from.
            quantized: Whether `bits` applies to it.
            rank: Rank of the LoRA branch that it gets if it stays packed. If None, LoRA files change it in a
                way that has to be merged, which expands it.
        """
        if len(source.shape) == 2:
            if self.keeps_packed(source) and rank is not None:
                branch = rank * sum(source.shape) * self.dtype.itemsize
                return sum(part.stored.size for part in source.parts) + branch
            if quantized and self.bits < 16:
                return quantized_bytes(*source.shape, self.bits, self.dtype.itemsize)
        return math.prod(source.shape) * self.dtype.itemsize

    def size_of(
        self, sources: Mapping[str, TensorSource], ranks: Mapping[str, int | None] = MappingProxyType({})
    ) -> ModuleSize:
        """Return the size of a model.

        Args:
            sources: The sources of its tensors, by name.
            ranks: What LoRA files change, by module, see `OpenModel.ranks_beside`.
        """
        blocks: dict[tuple[str, int], int] = {}
        rest = 0
        for name, source in sources.items():
            block = re.match(BLOCK, name)
            rank = ranks.get(name.removesuffix(".weight"), 0)
            if block:
                key = (block[1], int(block[2]))
                quantized = not (self.fp8 and re.search(r"mod(ulation)?\.lin\.", name))
                blocks[key] = blocks.get(key, 0) + self.nbytes(source, quantized, rank)
            else:
                rest += self.nbytes(source, False, rank)
        return ModuleSize(tuple(blocks[key] for key in sorted(blocks)), rest)

    def loaded(self, sources: Mapping[str, TensorSource], ranks: Mapping[str, int | None]) -> int:
        """Return the bytes of a model as it is loaded, before it is quantised. The arguments are as above."""
        return sum(
            self.nbytes(source, False, ranks.get(name.removesuffix(".weight"), 0))
            for name, source in sources.items()
        )


def model_on_meta(
    params: FluxParams, sources: Mapping[str, TensorSource], weight_format: WeightFormat
) -> Flux:
    """Build the transformer on the meta device, with weights in that format."""
    with torch.device("meta"):
        model = Flux(params).to(weight_format.dtype)
        for name, module in list(model.named_modules()):
            source = sources.get(f"{name}.weight")
            kind = source.kind if source and weight_format.keeps_packed(source) else None
            if source and kind and isinstance(module, nn.Linear):
                row_bytes = sum(part.stored.size for part in source.parts) // source.shape[0]
                packed = torch.empty(source.shape[0], row_bytes, dtype=torch.uint8)
                scale = torch.empty(()) if kind in EIGHT_BIT_FLOATS else None
                parent, _, attribute = name.rpartition(".")
                linear = PackedLinear(packed, kind, module.bias, scale, weight_format.dtype)
                setattr(model.get_submodule(parent), attribute, linear)
        if weight_format.fp8:
            to_fp8([model.double_blocks, model.single_blocks])
        elif weight_format.bits < 16:
            quantize_linears([model.double_blocks, model.single_blocks], weight_format.bits)
    return model
