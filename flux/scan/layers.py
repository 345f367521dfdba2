"""Sets of layers that are skipped together, their names, and their scores for plots and the report."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

LayerSet = tuple[int, ...]
Interval = tuple[float, float]

REFERENCE: LayerSet = ()  # no layer is skipped


def layer_sets(layers: str | Sequence[int] | Sequence[Sequence[int]], num_layers: int) -> list[LayerSet]:
    """List the sets to skip.

    Args:
        layers: "all" for each layer by itself, a list of layers for each of them by itself, or a list of
            lists for each list as a whole.
        num_layers: The number of layers of the model.
    """
    entries = range(num_layers) if isinstance(layers, str) else layers
    return [(entry,) if isinstance(entry, int) else tuple(sorted(entry)) for entry in entries]


def layers_text(layers: LayerSet) -> str:
    """Name a set in files: layers 5 and 7 are "05-07"."""
    return "-".join(f"{layer:02d}" for layer in layers)


def layer_ranges(layers: Sequence[int]) -> str:
    """Name a set on plots: layers 0, 1, 2, 5 and 6 are "0–2, 5, 6". Two layers do not make a range."""
    parts: list[str] = []
    for _, run in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0]):
        numbers = [layer for _, layer in run]
        is_range = len(numbers) > 2
        parts += [f"{numbers[0]}\N{EN DASH}{numbers[-1]}"] if is_range else map(str, numbers)
    return ", ".join(parts)


@dataclass(frozen=True)
class ScoredSet:
    """A set of layers as plots and the report show it.

    Attributes:
        layers: The layers.
        vitality: Their vitality.
        interval: The lower and upper end of its 95 % interval, or None if that is not known.
        kind: "double-stream", "single-stream" or "both kinds".
        is_vital: Whether all the layers are vital.
    """

    layers: LayerSet
    vitality: float
    interval: Interval | None
    kind: str
    is_vital: bool

    @property
    def ends(self) -> Interval:
        """The interval, or the vitality as both of its ends."""
        return self.interval or (self.vitality, self.vitality)

    @property
    def label(self) -> str:
        """The layers in few letters."""
        return layer_ranges(self.layers)


def scored_sets(
    vitality: Mapping[LayerSet, float],
    num_double: int,
    vital: Collection[int] = (),
    intervals: Mapping[LayerSet, Interval] | None = None,
) -> list[ScoredSet]:
    """Collect what is known of each set, in the order of `vitality`.

    Args:
        vitality: The vitality of each set. Other numbers of layers are shown in the same way.
        num_double: The number of double-stream layers, which come first.
        vital: The vital layers.
        intervals: The 95 % interval of each set. If None or empty, they are not known.
    """
    return [
        ScoredSet(
            layers,
            value,
            intervals[layers] if intervals else None,
            kind_of(layers, num_double),
            set(vital).issuperset(layers),
        )
        for layers, value in vitality.items()
    ]


def kind_of(layers: LayerSet, num_double: int) -> str:
    """Return "double-stream" (layers below `num_double`), "single-stream" or "both kinds"."""
    is_double = {layer < num_double for layer in layers}
    if len(is_double) == 2:
        return "both kinds"
    return "double-stream" if True in is_double else "single-stream"
