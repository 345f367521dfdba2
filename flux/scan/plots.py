"""A scan's scores as pictures: the bars of vitality, and the heat map of every prompt and layer.

Layers are bypassed in sets, `tuple[int, ...]`, mostly of one. The *change* that a set makes to a picture is 1
minus its similarity to the reference, the *vitality* of the set the mean of it (Stable Flow, equation 1).
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flux.files import write_bytes
from flux.images.sheets import FRAME, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

LayerSet = tuple[int, ...]
Interval = tuple[float, float]

QUIET = "#8a8a8a"
KIND_COLOURS = {"double-stream": "#1f6f9f", "single-stream": "#d9772b", "both kinds": "#7a5aa6"}
COLOUR_MAP = "viridis"  # of change; evenly graded, also for colour-blind eyes and in print
MAX_NAME = 60  # letters of a prompt beside a row of the heat map


def kind_of(layers: LayerSet, num_double: int) -> str:
    """One of KIND_COLOURS."""
    sorts = {layer < num_double for layer in layers}
    if len(sorts) == 2:
        return "both kinds"
    return "double-stream" if True in sorts else "single-stream"


def ranges(layers: LayerSet) -> str:
    """(0, 1, 2, 5, 7) -> "0–2, 5, 7": three or more consecutive layers as a range."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(
        f"{run[0]}\N{EN DASH}{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def plot_vitality(
    scores: dict[int | LayerSet, float],
    num_double: int,
    vital: set[int],
    threshold: float | None,
    path: str | Path,
    intervals: dict[int | LayerSet, Interval] | None = None,
) -> None:
    """Writes a bar chart of the vitality of each layer, or set of layers bypassed together, as PNG, SVG or
    PDF by suffix.

    `num_double` tells the double-stream layers (below it) from the single-stream ones; a bar is marked vital
    if all its layers are in `vital`. `threshold` is drawn as a line, `intervals` (95 %: lower, upper end; by
    the keys of `scores`) as a whisker on each bar. Raises ValueError if there are no scores, InputError as
    `write_bytes`.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not scores:
        raise ValueError("a plot needs at least one score")
    ends = {key: intervals[key] if intervals else (score, score) for key, score in scores.items()}
    bars = sorted(
        (key if isinstance(key, tuple) else (key,), score, *ends[key]) for key, score in scores.items()
    )
    sets, values, lows, highs = zip(*bars, strict=True)
    kinds = [kind_of(layers, num_double) for layers in sets]
    marked = [vital.issuperset(layers) for layers in sets]
    labels = [ranges(layers) for layers in sets]
    top, bottom = max(*values, *highs, threshold or 0, 0), min(*values, *lows, 0)
    span = (top - bottom) or 1.0

    places = max(len(bars), 8)  # a few bars should not be walls
    inches = min(40, max(7, 1.2 + 0.24 * places))
    upright = max(map(len, labels)) * 0.075 > (inches - 1) / places  # the labels would not fit side by side

    figure = Figure(figsize=(inches, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = np.array([to_rgb(KIND_COLOURS[kind]) for kind in kinds])
    colours = np.where(np.array(marked)[:, None], colours, 0.4 * colours + 0.6)
    axes.bar(range(len(bars)), values, width=0.76, color=colours, zorder=2)
    stars = [position for position, mark in enumerate(marked) if mark]
    heights = [max(values[position], highs[position], 0) + 0.04 * span for position in stars]
    axes.plot(stars, heights, "*", color=INK, markersize=7, zorder=3)

    axes.set_xlim((len(bars) - 1 - places) / 2 - 0.2, (len(bars) - 1 + places) / 2 + 0.2)
    axes.set_ylim(bottom - (0.04 * span if bottom < 0 else 0), top + 0.1 * span)
    axes.set_xticks(range(len(bars)), labels, fontsize=8, rotation=90 if upright else 0)
    for tick, mark in zip(axes.get_xticklabels(), marked, strict=True):
        tick.set(fontweight="bold" if mark else "normal", color=INK if mark else QUIET)
    single_layers = all(len(layers) == 1 for layers in sets)
    axes.set_xlabel("bypassed layer" if single_layers else "layers bypassed together")
    axes.set_ylabel("vitality (mean of 1 \N{MINUS SIGN} similarity)")
    axes.grid(axis="y", color=FRAME, linewidth=0.8, zorder=0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axhline(0, color=INK, linewidth=1, zorder=3)

    legend: list = _key(kinds)
    if stars:
        legend.append(Line2D([], [], color=INK, marker="*", linestyle="", markersize=8, label="vital"))
    if intervals:
        whiskers = axes.vlines(range(len(bars)), lows, highs, color=INK, linewidth=1, zorder=3)
        whiskers.set_label("95 % interval")
        legend.append(whiskers)
    if threshold is not None:
        name = f"threshold {threshold:g}"
        legend.append(axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, label=name))
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    _write_figure(figure, path)


def plot_heat_map(
    table: ArrayLike,
    sets: Sequence[LayerSet],
    prompts: Sequence[str],
    num_double: int,
    vital: set[int],
    path: str | Path,
) -> None:
    """Writes the change that each set of layers makes to each prompt's picture as a map, PNG, SVG or PDF by
    suffix.

    Args:
        table: similarity to the reference, "prompts sets".
        sets, prompts: what its columns and rows are.
        num_double, vital: as for `plot_vitality`.

    Raises:
        InputError: as `write_bytes`.
    """
    from matplotlib.figure import Figure

    change = 1 - np.asarray(table, dtype=float)
    labels = [ranges(layers) for layers in sets]
    longest = max(map(len, labels))
    figure = Figure(figsize=(6 + 0.22 * len(sets), 1.4 + 0.22 * len(prompts)), dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(change, COLOUR_MAP, aspect="auto", interpolation="nearest", **colour_limits(change))
    axes.set_xticks(range(len(sets)), labels, fontsize=8, rotation=90 if longest > 2 else 0)
    kinds = [kind_of(layers, num_double) for layers in sets]
    for tick, layers, kind in zip(axes.get_xticklabels(), sets, kinds, strict=True):
        tick.set(fontweight="bold" if vital.issuperset(layers) else "normal", color=KIND_COLOURS[kind])
    names = [
        f"{prompt[:MAX_NAME]}\N{HORIZONTAL ELLIPSIS}" if len(prompt) > MAX_NAME else prompt
        for prompt in prompts
    ]
    axes.set_yticks(range(len(prompts)), names, fontsize=8)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)  # two dollars in a prompt are no formula
    axes.set_xlabel("bypassed (bold: vital)" if vital else "bypassed")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="change (1 \N{MINUS SIGN} similarity)", pad=0.01)
    legend = _key(kinds)
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    _write_figure(figure, path)


def colour_limits(change: np.ndarray) -> dict[str, float]:
    """The colour scale of changes: from none, or less where rounding made it so, to the greatest there is."""
    return {"vmin": min(0.0, change.min()), "vmax": max(1e-3, change.max())}


def _key(kinds: Sequence[str]) -> list["Patch"]:
    """Those of KIND_COLOURS that there are, for a legend."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items() if kind in kinds]


def _write_figure(figure: "Figure", path: str | Path) -> None:
    buffer = BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower() or "png")
    write_bytes(path, buffer.getvalue())
