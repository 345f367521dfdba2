"""The keys and values of a reference's step, of which those of some layers are rounded to 8-bit floats.

Queries that are kept stay as they are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flux.math import Parts
from flux.modules.float8 import E4M3
from flux.modules.ops import Rounded

SCALE_BYTES = 4  # of each head of each token


@dataclass(frozen=True, eq=False)
class KeptLayers(Mapping[int, Parts]):
    """Image keys and values by layer, and kept queries behind them, "R H I D" each.

    Rounded ones are unrounded when they are asked for.

    Attributes:
        exact: Those that are kept as they are.
        rounded: Keys and values in 8 bits, with a scale for each head of each token.
    """

    exact: dict[int, Parts]
    rounded: dict[int, tuple[Rounded, Rounded]] = field(default_factory=dict)

    @classmethod
    def of(cls, kept: Mapping[int, Parts], exact: frozenset[int]) -> "KeptLayers":
        """Round all layers but those of `exact`."""
        rounded = {n: (Rounded.of(k), Rounded.of(v)) for n, (k, v, *_) in kept.items() if n not in exact}
        return cls({n: parts for n, parts in kept.items() if n in exact}, rounded)

    def __getitem__(self, layer: int) -> Parts:
        if layer in self.exact:
            return self.exact[layer]
        k, v = self.rounded[layer]
        return _unrounded(k), _unrounded(v)

    def __iter__(self) -> Iterator[int]:
        yield from self.exact
        yield from self.rounded

    def __len__(self) -> int:
        return len(self.exact) + len(self.rounded)

    def tensors(self) -> list[Tensor]:
        """All tensors, as they are stored."""
        exact = [x for parts in self.exact.values() for x in parts]
        return exact + [x for kv in self.rounded.values() for part in kv for x in (part.packed, part.scale)]

    def map(self, move: Callable[[Tensor], Tensor]) -> "KeptLayers":
        """The same with each stored tensor moved."""

        def moved(x: Rounded) -> Rounded:
            return Rounded(move(x.packed), move(x.scale), x.dtype)

        exact = {n: tuple(move(x) for x in parts) for n, parts in self.exact.items()}
        return KeptLayers(exact, {n: (moved(k), moved(v)) for n, (k, v) in self.rounded.items()})

    def clear(self) -> None:
        """Forget all of them."""
        self.exact.clear()
        self.rounded.clear()


def rounded_bytes(numbers: int, head_size: int) -> int:
    """The bytes of so many numbers once they are rounded."""
    return numbers * E4M3.itemsize + numbers // head_size * SCALE_BYTES


def _unrounded(x: Rounded) -> Tensor:
    return x.packed.to(x.dtype) * x.scale.to(x.dtype)
