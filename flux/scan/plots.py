"""A scan's scores as images: the bars of vitality, and the heat map of every prompt and layer."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from flux.files import write_bytes
from flux.images.fonts import font_file
from flux.images.sheets import FRAME, INK
from flux.scan.layers import Interval, LayerSet, ScoredSet, kind_of, layer_ranges, scored_sets

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE_INK = "#8a8a8a"
KIND_COLOURS = {"double-stream": "#1f6f9f", "single-stream": "#d9772b", "both kinds": "#7a5aa6"}
COLOUR_MAP = "viridis"  # of change; evenly graded, also for colour-blind eyes and in print
MAX_NAME = 60  # letters of a prompt beside a row of the heat map


def plot_vitality(
    vitality: Mapping[LayerSet, float],
    num_double: int,
    vital: Collection[int],
    threshold: float | None,
    path: str | Path,
    intervals: Mapping[LayerSet, Interval] | None = None,
    measure: str = "vitality (mean of 1 \N{MINUS SIGN} similarity)",
    axis: str | None = None,
    chosen: str = "vital",
) -> None:
    """Writes a bar chart of the vitality of each layer, or of each set of layers that were skipped together.

    Other numbers of layers are drawn in the same way.

    Args:
        vitality: The vitality of each set.
        num_double: The number of double-stream layers, which come first.
        vital: The vital layers. A bar is marked if all its layers are vital.
        threshold: If given, it is drawn as a line.
        path: The file to write. Its suffix decides between PNG, SVG and PDF.
        intervals: If given, the 95 % interval of each set, drawn as a line on its bar.
        measure: What the numbers are.
        axis: What the layers are. If None, skipped layers.
        chosen: What the marked layers are.

    Raises:
        ValueError: There are no vitalities.
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not vitality:
        raise ValueError("a plot needs at least one score")
    bars = scored_sets(sorted(vitality), vitality, intervals, vital, num_double)
    values = [bar.vitality for bar in bars]
    lows, highs = [bar.ends[0] for bar in bars], [bar.ends[1] for bar in bars]
    top, bottom = max(*values, *highs, threshold or 0, 0), min(*values, *lows, 0)
    span = (top - bottom) or 1.0

    places = max(len(bars), 8)  # few bars do not become walls
    inches = min(40, max(7, 1.2 + 0.24 * places))
    # Horizontal labels would overlap.
    upright = max(len(bar.label) for bar in bars) * 0.075 > (inches - 1) / places

    figure = Figure(figsize=(inches, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(bars)), values, width=0.76, color=_bar_colours(bars), zorder=2)
    stars = [place for place, bar in enumerate(bars) if bar.is_vital]
    heights = [max(values[place], highs[place], 0) + 0.04 * span for place in stars]
    axes.plot(stars, heights, "*", color=INK, markersize=7, zorder=3)

    axes.set_xlim((len(bars) - 1 - places) / 2 - 0.2, (len(bars) - 1 + places) / 2 + 0.2)
    axes.set_ylim(bottom - (0.04 * span if bottom < 0 else 0), top + 0.1 * span)
    labels = [bar.label for bar in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize=8, rotation=90 if upright else 0)
    for tick, bar in zip(axes.get_xticklabels(), bars, strict=True):
        tick.set(fontweight="bold" if bar.is_vital else "normal", color=INK if bar.is_vital else PALE_INK)
    is_single = all(len(bar.layers) == 1 for bar in bars)
    axes.set_xlabel(axis or ("skipped layer" if is_single else "layers skipped together"))
    axes.set_ylabel(measure)
    axes.grid(axis="y", color=FRAME, linewidth=0.8, zorder=0)
    axes.axhline(0, color=INK, linewidth=1, zorder=3)

    legend = _kind_patches([bar.kind for bar in bars])
    if stars:
        legend.append(Line2D([], [], color=INK, marker="*", linestyle="", markersize=8, label=chosen))
    if intervals:
        whiskers = axes.vlines(range(len(bars)), lows, highs, color=INK, linewidth=1, zorder=3)
        whiskers.set_label("95 % interval")
        legend.append(whiskers)
    if threshold is not None:
        name = f"threshold {threshold:g}"
        legend.append(axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, label=name))
    _finish(figure, axes, legend, path)


def plot_heat_map(
    similarity: ArrayLike,
    layer_sets: Sequence[LayerSet],
    prompts: Sequence[str],
    num_double: int,
    vital: Collection[int],
    path: str | Path,
    axis: str | None = None,
) -> None:
    """Writes a heat map of the change that each set of layers makes to each prompt's image.

    Args:
        similarity: The similarities to the references, "prompts sets".
        layer_sets: The set of each column.
        prompts: The prompt of each row.
        num_double: As for `plot_vitality`.
        vital: As for `plot_vitality`.
        path: As for `plot_vitality`.
        axis: What the columns are. If None, skipped layers.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    change = 1 - np.asarray(similarity, dtype=float)
    labels = [layer_ranges(layers) for layers in layer_sets]
    kinds = [kind_of(layers, num_double) for layers in layer_sets]
    size = (6 + 0.22 * len(layer_sets), 1.4 + 0.22 * len(prompts))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(change, COLOUR_MAP, aspect="auto", interpolation="nearest", **colour_limits(change))
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=90 if max(map(len, labels)) > 2 else 0)
    for tick, layers, kind in zip(axes.get_xticklabels(), layer_sets, kinds, strict=True):
        tick.set(fontweight="bold" if set(vital).issuperset(layers) else "normal", color=KIND_COLOURS[kind])
    names = [
        f"{prompt[:MAX_NAME]}\N{HORIZONTAL ELLIPSIS}" if len(prompt) > MAX_NAME else prompt
        for prompt in prompts
    ]
    axes.set_yticks(range(len(prompts)), names, fontsize=8)
    families = _font_families("".join(names))
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)  # two dollar signs in a prompt are not a formula
        if families:
            tick.set_fontfamily(families)
    axes.set_xlabel(axis or ("skipped (bold: vital)" if vital else "skipped"))
    figure.colorbar(image, ax=axes, label="change (1 \N{MINUS SIGN} similarity)", pad=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `font_file` has named them, in one line
        _finish(figure, axes, _kind_patches(kinds), path)


class ColourLimits(TypedDict):
    """The changes at the two ends of the colour map."""

    vmin: float
    vmax: float


def colour_limits(change: np.ndarray) -> ColourLimits:
    """Spans the colour map from no change, or less if rounding made it so, to the largest change."""
    return {"vmin": min(0.0, change.min()), "vmax": max(1e-3, change.max())}


def _bar_colours(bars: Sequence[ScoredSet]) -> np.ndarray:
    """Returns the colour of each bar's kind, pale unless the bar is vital."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(KIND_COLOURS[bar.kind]) for bar in bars])
    return np.where(np.array([bar.is_vital for bar in bars])[:, None], colours, 0.4 * colours + 0.6)


def _kind_patches(kinds: Collection[str]) -> "list[Artist]":
    """Makes a legend of those of KIND_COLOURS that occur."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items() if kind in kinds]


def _finish(figure: "Figure", axes: "Axes", legend: "list[Artist]", path: str | Path) -> None:
    """Removes the frame, adds the legend above, and writes the file."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower() or "png")
    write_bytes(path, buffer.getvalue())


def _font_families(letters: str) -> list[str]:
    """Returns the usual font and an installed one for the letters it lacks. Empty if it lacks none."""
    from matplotlib import font_manager

    file = font_file(letters)
    if file == font_file(""):
        return []
    name = font_manager.FontProperties(fname=file).get_name()
    if all(known.name != name for known in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(file)
    return ["DejaVu Sans", name]
