"""A scan to look at: protocol, bars, heat map and every picture in one HTML file that needs no server, no
network and no other file. assets/report.html is its template; the words are those of plots.py.
"""

import base64
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from tqdm import tqdm

from flux.files import write_text
from flux.images.io import read_image
from flux.scan.plots import COLOUR_MAP, KIND_COLOURS, Interval, LayerSet, colour_limits, kind_of, ranges

CLASSES = {"double-stream": "double", "single-stream": "single", "both kinds": "both"}  # in the style sheet
THUMBNAIL = 112  # pixels of the longer side
QUALITY = 70  # of WebP: 64 prompts x 57 layers make 8 MB of flux-nano's pictures, 23 MB of very busy ones
CHART_HEIGHT, CHART_TOP, CHART_BOTTOM = 270, 18, 240  # pixels; under the last stand the layers' numbers


def write_report(
    path: str | Path,
    record: dict[str, Any],
    pictures: Callable[[int, LayerSet], Path],
    sets: Sequence[LayerSet],
    table: ArrayLike,
    vitality: dict[LayerSet, float],
    intervals: dict[LayerSet, Interval] | None,
    vital: Sequence[int],
    num_double: int,
    progress: bool = True,
) -> None:
    """Writes a finished sweep and its scores as one HTML file: protocol, bars, heat map, every picture as a
    thumbnail.

    Args:
        record: the sweep's run.json.
        pictures: where the picture of a prompt's number with a set bypassed is; the empty set: the reference.
        sets: what was bypassed.
        table: similarity to the reference, "prompts sets"; a row is a prompt with one seed, seeds of a prompt
            in a row; fewer rows than the record has: the sweep ended early.
        vitality, intervals: by set; the intervals are of 95 %, lower and upper end.
        vital, num_double: as for `plot_vitality`.

    Raises:
        InputError: a picture cannot be read, or as `write_bytes`.
    """
    change = 1 - np.asarray(table, dtype=float)
    settings = record["settings"]
    seeds = settings.get("seeds", 1)
    entries = [
        (entry["prompt"], entry["seed"] + more) for entry in settings["prompts"] for more in range(seeds)
    ]
    shown = entries[: len(change)]
    layers = _Layers(sets, vitality, intervals, set(vital), num_double)

    # One prompt at a time: Ctrl-C waits for what was handed to the threads.
    sections = []
    with ThreadPoolExecutor() as pool:
        for number, (prompt, seed) in enumerate(tqdm(shown, "report", unit="prompt", disable=not progress)):
            paths = [pictures(number, bypassed) for bypassed in ((), *sets)]
            thumbnails = list(pool.map(_thumbnail, paths))
            sections.append(_section(number, prompt, seed, thumbnails, change[number], layers))

    title = f"Vital layers of {settings['model']}"
    names = ranges(tuple(vital)) or "none"
    noun = "layers" if all(len(bypassed) == 1 for bypassed in sets) else "sets of layers"
    summary = f"Vital: <strong>{names}</strong> ({len(vital)} of {len(sets)} {noun} that were bypassed)."
    limits = colour_limits(change)
    template = Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=summary,
        protocol=_protocol(record, len(shown), len(entries)),
        record=escape(json.dumps(record, indent=2, ensure_ascii=False)),
        keys=layers.keys(),
        bars=layers.chart(),
        numbers=layers.numbers(),
        gradient=", ".join(_colours(np.linspace(0, 1, 9), 0, 1)),
        low=f"{limits['vmin']:.2f}",
        high=f"{limits['vmax']:.2f}",
        heat=_heat_map(change, shown, layers),
        sections="\n".join(sections),
    )
    write_text(path, page)


class _Layers:
    """What the page says of each set of layers, by its place in `sets`."""

    def __init__(
        self,
        sets: Sequence[LayerSet],
        vitality: dict[LayerSet, float],
        intervals: dict[LayerSet, Interval] | None,
        vital: set[int],
        num_double: int,
    ) -> None:
        self.values = [vitality[layers] for layers in sets]
        self.ends = [intervals[layers] for layers in sets] if intervals else None
        self.labels = [ranges(layers) for layers in sets]
        self.kinds = [kind_of(layers, num_double) for layers in sets]
        self.marked = [vital.issuperset(layers) for layers in sets]
        self.colours = [CLASSES[kind] for kind in self.kinds]
        self.classes = [
            colour + " vital" * mark for colour, mark in zip(self.colours, self.marked, strict=True)
        ]
        self.stars = ["\N{BLACK STAR}" if mark else "" for mark in self.marked]
        self.names = [
            f"layer{'s' if len(layers) > 1 else ''} {label}"
            for layers, label in zip(sets, self.labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.values)

    def told(self, i: int) -> str:
        """A set and its scores in one line."""
        interval = f" (95 %: {self.ends[i][0]:.3f} to {self.ends[i][1]:.3f})" if self.ends else ""
        kind = self.kinds[i] + (", vital" if self.marked[i] else "")
        return f"{self.names[i]}, {kind}: vitality {self.values[i]:.3f}{interval}"

    def keys(self) -> str:
        """The chart's legend."""
        pairs = dict(zip(self.kinds, self.colours, strict=True))
        keys = [f'<i class="{pairs[kind]}"></i> {kind}' for kind in KIND_COLOURS if kind in pairs]
        if any(self.marked):
            keys.append("\N{BLACK STAR} full colour: vital")
        if self.ends:
            keys.append("line: 95 % interval")
        return "".join(f"<span>{key}</span>" for key in keys)

    def chart(self) -> str:
        """The bars as SVG: across in percents, so that texts keep their size at every width."""
        from matplotlib.ticker import MaxNLocator

        ends = self.ends or [(value, value) for value in self.values]
        extent = [0.0, 1e-3, *self.values, *(end for pair in ends for end in pair)]
        bottom, top = min(extent), max(extent)
        ticks = [tick for tick in MaxNLocator(5).tick_values(bottom, top) if bottom <= tick <= top]

        def y(value: float) -> float:
            return round(CHART_BOTTOM - (value - bottom) / (top - bottom) * (CHART_BOTTOM - CHART_TOP), 1)

        lines = [
            f'<line class="grid" x1="0" x2="100%" y1="{y(tick)}" y2="{y(tick)}"/>'
            f'<text class="axis" x="-6" y="{y(tick)}">{tick:.3g}</text>'
            for tick in ticks
        ]
        bars = []
        for i, (value, (low, high)) in enumerate(zip(self.values, ends, strict=True)):
            upper, lower = sorted((y(value), y(0)))
            parts = [
                f'<rect class="area" width="100%" height="{CHART_HEIGHT}"/>',
                f'<rect class="value" x="14%" width="72%" y="{upper}" height="{lower - upper:.1f}"/>',
            ]
            if self.ends:
                parts.append(f'<line class="interval" x1="50%" x2="50%" y1="{y(high)}" y2="{y(low)}"/>')
            if self.marked[i]:
                parts.append(f'<text x="50%" y="{min(upper, y(high)) - 4:.1f}">\N{BLACK STAR}</text>')
            parts.append(f'<text x="50%" y="{CHART_BOTTOM + 20}">{self.labels[i]}</text>')
            bars.append(
                f'<svg class="bar {self.classes[i]}" data-set="{i}" data-vitality="{self.values[i]}" '
                f'x="{100 * i / len(self):.3f}%" width="{100 / len(self):.3f}%" tabindex="{i and -1}" '
                f'role="img" aria-label="{self.told(i)}">{"".join(parts)}</svg>'
            )
        column = max(20, 7 * max(map(len, self.labels)) + 6)
        return (
            f'<svg class="bars" height="{CHART_HEIGHT}" style="min-width: {column * len(self)}px; '
            f'max-width: {3 * column * max(len(self), 8)}px" role="group" aria-label="vitality by layer">'
            f'{"".join(lines)}<line class="zero" x1="0" x2="100%" y1="{y(0)}" y2="{y(0)}"/>'
            f'<svg class="row" data-group overflow="visible">{"".join(bars)}</svg></svg>'
        )

    def numbers(self) -> str:
        """The chart as a table."""
        rows = []
        for i, value in enumerate(self.values):
            interval = f"{self.ends[i][0]:.4f} to {self.ends[i][1]:.4f}" if self.ends else ""
            cells = [self.kinds[i], f"{value:.4f}", interval, "vital" if self.marked[i] else ""]
            rows.append(
                f'<tr class="{self.classes[i]}"><th scope="row">{self.labels[i]}</th>'
                f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            )
        heads = "".join(
            f'<th scope="col">{head}</th>'
            for head in ("layer", "kind", "vitality", "95 % interval" if self.ends else "", "")
        )
        return f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _protocol(record: dict[str, Any], shown: int, planned: int) -> str:
    """How the pictures were made, as terms of a description list."""
    settings = record["settings"]
    seeds = settings.get("seeds", 1)
    prompts = f"{planned // seeds} prompts, {seeds} seeds each" if seeds > 1 else f"{planned} prompts"
    terms = {
        "model": settings["model"],
        "weights": settings.get("weights"),
        "checkpoint": record.get("checkpoint"),
        "size": f"{settings['width']} \N{MULTIPLICATION SIGN} {settings['height']}",
        "steps": settings["num_steps"],
        "guidance": settings["guidance"],
        "true CFG": settings["true_cfg"],
        "negative prompt": settings.get("negative_prompt"),
        "left of a bypassed layer's output": settings.get("scale"),
        "prompts": prompts if shown == planned else f"{prompts}; ended after {shown} of {planned}",
        "encoder": settings.get("encoder"),
    }
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    items = [
        f"<div><dt>{term}</dt><dd>{escape(str(value))}</dd></div>"
        for term, value in terms.items()
        if value not in (None, "")
    ]
    return "".join(items) + f'<div class="whole"><dt>made with</dt><dd>{escape(versions)}</dd></div>'


def _heat_map(change: np.ndarray, entries: Sequence[tuple[str, int]], layers: _Layers) -> str:
    long = " long" if max(map(len, layers.labels)) > 2 else ""
    heads = "".join(
        f'<th scope="col" class="{layers.classes[i]}{long}" data-set="{i}"><span>{label}</span></th>'
        for i, label in enumerate(layers.labels)
    )
    limits = colour_limits(change)
    rows = []
    for number, (prompt, seed) in enumerate(entries):
        cells = "".join(
            f'<td data-set="{i}" data-change="{value:.3f}" tabindex="{(number or i) and -1}" '
            f'style="background: {colour}">{value:.3f}</td>'
            for i, (value, colour) in enumerate(zip(change[number], _colours(change[number], **limits)))
        )
        whole = escape(f"prompt {number}, seed {seed}: {prompt}")
        name = f'<th scope="row" class="name" dir="auto" title="{whole}">{escape(prompt)}</th>'
        rows.append(f'<tr class="row" id="heat-prompt-{number}">{name}{cells}</tr>')
    return (
        f'<table class="heat" style="min-width: {9 + 1.1 * len(layers):.1f}rem; '
        f'max-width: {16 + 3 * len(layers)}rem"><thead><tr class="row">'
        f'<th scope="col" class="name">prompt</th>{heads}</tr></thead>'
        f"<tbody data-group>{''.join(rows)}</tbody></table>"
    )


def _colours(values: np.ndarray, vmin: float, vmax: float) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[COLOUR_MAP]((values - vmin) / (vmax - vmin))]


def _section(
    number: int, prompt: str, seed: int, thumbnails: Sequence[str], change: np.ndarray, layers: _Layers
) -> str:
    """A prompt's reference and bypassed pictures; `thumbnails` has the reference's first."""
    reference, *bypassed = thumbnails
    items = "\n".join(
        f'<li class="{layers.classes[i]}" data-set="{i}" data-change="{value:.3f}" tabindex="{i and -1}">'
        f'<img {image} alt="{layers.names[i]} bypassed, {layers.kinds[i]}">'
        f"<span><b>{layers.labels[i]} {layers.stars[i]}</b> {value:.3f}</span></li>"
        for i, (image, value) in enumerate(zip(bypassed, change, strict=True))
    )
    return (
        f'<section class="prompt" id="prompt-{number}">\n'
        f'<header><h3 dir="auto">{escape(prompt)}</h3>'
        f'<p class="quiet">prompt {number}, seed {seed}, mean change {change.mean():.3f}</p></header>\n'
        f'<figure><img {reference} alt="reference: {escape(prompt)}">'
        f'<figcaption class="quiet">reference</figcaption></figure>\n'
        f'<ul class="pictures row" data-group>\n{items}\n</ul>\n</section>'
    )


def _thumbnail(path: Path) -> str:
    """The picture in a file, small, as the attributes of an <img>."""
    image = read_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'src="data:image/webp;base64,{data}" width="{image.width}" height="{image.height}" '
        'loading="lazy" decoding="async"'
    )
