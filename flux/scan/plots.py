"""A scan's scores as images: the bars of vitality, and the heat map of every prompt and layer."""

import warnings
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from flux.files import write_bytes
from flux.images.fonts import font_file
from flux.images.sheets import FRAME, INK
from flux.scan.findings import Findings
from flux.scan.layers import ScoredSet

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALE_INK = "#8a8a8a"
KIND_COLOURS = {"double-stream": "#1f6f9f", "single-stream": "#d9772b", "both kinds": "#7a5aa6"}
COLOUR_MAP = "viridis"  # of change; evenly graded, also for colour-blind eyes and in print
MAX_NAME = 60  # letters of a prompt beside a row of the heat map


def plot_vitality(
    sets: Sequence[ScoredSet],
    path: str | Path,
    threshold: float | None = None,
    *,
    measure: str = "vitality",
    axis: str | None = None,
    chosen: str = "vital",
) -> None:
    """Write a bar chart of the vitality of each layer, or of each set of layers that were skipped together.

    Args:
        sets: The sets with their vitalities. Bars stand in the order of the layers.
        path: The file to write. Its suffix decides between PNG, SVG and PDF.
        threshold: If given, it is drawn as a line.
        measure: What the numbers are.
        axis: What the layers are. If None, skipped layers.
        chosen: What the marked layers are.

    Raises:
        ValueError: There are no sets.
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    if not sets:
        raise ValueError("a plot needs at least one score")
    bars = sorted(sets, key=lambda bar: bar.layers)
    places = max(len(bars), 8)  # few bars do not become walls
    inches = min(40, max(7, 1.2 + 0.24 * places))
    figure = Figure(figsize=(inches, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(bars)), [bar.vitality for bar in bars], width=0.76, color=_bar_colours(bars), zorder=2)
    marks = _draw_marks(axes, bars, threshold, chosen)

    axes.set_xlim((len(bars) - 1 - places) / 2 - 0.2, (len(bars) - 1 + places) / 2 + 0.2)
    labels = [bar.label for bar in bars]
    is_crowded = max(map(len, labels)) * 0.075 > (inches - 1) / places  # horizontal labels would overlap
    axes.set_xticks(range(len(bars)), labels, fontsize=8, rotation=90 if is_crowded else 0)
    for tick, bar in zip(axes.get_xticklabels(), bars, strict=True):
        tick.set(fontweight="bold" if bar.is_vital else "normal", color=INK if bar.is_vital else PALE_INK)
    is_single = all(len(bar.layers) == 1 for bar in bars)
    axes.set_xlabel(axis or ("skipped layer" if is_single else "layers skipped together"))
    axes.set_ylabel(measure)
    axes.grid(axis="y", color=FRAME, linewidth=0.8, zorder=0)
    _finish(figure, axes, [*_kind_patches([bar.kind for bar in bars]), *marks], path)


def _draw_marks(
    axes: "Axes", bars: Sequence[ScoredSet], threshold: float | None, chosen: str
) -> "list[Artist]":
    """Draw stars, intervals and the threshold, make room for them, and return their part of the legend."""
    from matplotlib.lines import Line2D

    lows, highs = zip(*(bar.ends for bar in bars))
    values = [bar.vitality for bar in bars]
    top, bottom = max(*values, *highs, threshold or 0, 0), min(*values, *lows, 0)
    span = (top - bottom) or 1.0
    axes.set_ylim(bottom - (0.04 * span if bottom < 0 else 0), top + 0.1 * span)

    stars = [place for place, bar in enumerate(bars) if bar.is_vital]
    heights = [max(values[place], highs[place], 0) + 0.04 * span for place in stars]
    axes.plot(stars, heights, "*", color=INK, markersize=7, zorder=3)
    axes.axhline(0, color=INK, linewidth=1, zorder=3)
    legend: list[Artist] = []
    if stars:
        legend.append(Line2D([], [], color=INK, marker="*", linestyle="", markersize=8, label=chosen))
    if any(bar.interval for bar in bars):
        whiskers = axes.vlines(range(len(bars)), lows, highs, color=INK, linewidth=1, zorder=3)
        whiskers.set_label("95 % interval")
        legend.append(whiskers)
    if threshold is not None:
        name = f"threshold {threshold:g}"
        legend.append(axes.axhline(threshold, color=INK, linestyle="--", linewidth=1, label=name))
    return legend


def plot_heat_map(found: Findings, path: str | Path, *, axis: str | None = None) -> None:
    """Write a heat map of the change that each set of layers makes to each prompt's image.

    Args:
        found: The changes, sets and prompts.
        path: As for `plot_vitality`.
        axis: What the columns are. If None, skipped layers.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    change, sets = found.change, found.sets
    size = (6 + 0.22 * len(sets), 1.4 + 0.22 * len(found.prompts))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(change, COLOUR_MAP, aspect="auto", interpolation="nearest", **colour_limits(change))
    labels = [each.label for each in sets]
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=90 if max(map(len, labels)) > 2 else 0)
    for tick, each in zip(axes.get_xticklabels(), sets, strict=True):
        tick.set(fontweight="bold" if each.is_vital else "normal", color=KIND_COLOURS[each.kind])
    _name_rows(axes, found.prompts)
    axes.set_xlabel(axis or ("skipped (bold: vital)" if found.vital else "skipped"))
    figure.colorbar(image, ax=axes, label=f"change ({found.change_name})", pad=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # `font_file` has named them, in one line
        _finish(figure, axes, _kind_patches([each.kind for each in sets]), path)


def _name_rows(axes: "Axes", prompts: Sequence[str]) -> None:
    """Write the prompts beside the rows, cut to MAX_NAME letters, in a font that has their letters."""
    names = [
        f"{prompt[:MAX_NAME]}\N{HORIZONTAL ELLIPSIS}" if len(prompt) > MAX_NAME else prompt
        for prompt in prompts
    ]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    families = _font_families("".join(names))
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)  # two dollar signs in a prompt are not a formula
        if families:
            tick.set_fontfamily(families)


class ColourLimits(TypedDict):
    """The changes at the two ends of the colour map."""

    vmin: float
    vmax: float


def colour_limits(change: np.ndarray) -> ColourLimits:
    """Span the colour map from no change, or less if rounding made it so, to the largest change."""
    return {"vmin": min(0.0, change.min()), "vmax": max(1e-3, change.max())}


def _bar_colours(bars: Sequence[ScoredSet]) -> np.ndarray:
    """Return the colour of each bar's kind, pale unless the bar is vital."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb(KIND_COLOURS[bar.kind]) for bar in bars])
    return np.where(np.array([bar.is_vital for bar in bars])[:, None], colours, 0.4 * colours + 0.6)


def _kind_patches(kinds: Collection[str]) -> "list[Artist]":
    """Make a legend of those of KIND_COLOURS that occur."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items() if kind in kinds]


def _finish(figure: "Figure", axes: "Axes", legend: "list[Artist]", path: str | Path) -> None:
    """Remove the frame, add the legend above, and write the file."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(handles=legend, loc="outside upper center", ncols=len(legend), frameon=False, fontsize=9)
    buffer = BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower() or "png")
    write_bytes(path, buffer.getvalue())


def _font_families(letters: str) -> list[str]:
    """Return the usual font and an installed one for the letters it lacks. Empty if it lacks none."""
    from matplotlib import font_manager

    file = font_file(letters)
    if file == font_file(""):
        return []
    name = font_manager.FontProperties(fname=file).get_name()
    if all(known.name != name for known in font_manager.fontManager.ttflist):
        font_manager.fontManager.addfont(file)
    return ["DejaVu Sans", name]
