"""The report of a scan: protocol, bars, heat map and all images in one HTML file.

The file needs no server, no network and no other file. Its markup is report.html, a Jinja template.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from flux.files import write_text
from flux.images.io import read_image
from flux.scan.findings import Findings
from flux.scan.layers import REFERENCE, LayerSet, ScoredSet, layer_ranges
from flux.scan.plots import COLOUR_MAP, KIND_COLOURS, colour_limits

CLASSES = {"double-stream": "double", "single-stream": "single", "both kinds": "both"}  # in the style sheet
THUMBNAIL = 112  # pixels of the longer side
QUALITY = 70  # of WebP: 64 prompts x 57 layers make 8 MB of flux-nano's images, 23 MB of very busy ones
CHART_HEIGHT, CHART_TOP, CHART_BOTTOM = 270, 18, 240  # pixels; the layers' numbers stand below the bottom


@dataclass(frozen=True)
class ReportWords:
    """The words of a report: those of a scan, or of another study of layers.

    Attributes:
        title: What the page is about, before the model's name.
        measure: The number of each set of layers.
        chosen: What the layers are that the rule has chosen.
        left_out: What was done with a set of layers.
        reference: The image that all others of a prompt are compared with.
        base: One more image of each prompt, if there is one.
        kept: What the settings' `scale` is.
    """

    title: str = "Vital layers of"
    measure: str = "vitality"
    chosen: str = "vital"
    left_out: str = "skipped"
    reference: str = "reference"
    base: str = ""
    kept: str = "kept of a skipped layer's output"


SCAN_WORDS = ReportWords()


@dataclass(frozen=True)
class Thumbnail:
    """A small image as a data URL, and its size in pixels."""

    url: str
    width: int
    height: int


def write_report(
    path: str | Path,
    record: Mapping[str, Any],
    found: Findings,
    image_path: Callable[[int, LayerSet], Path],
    *,
    words: ReportWords = SCAN_WORDS,
    base_path: Callable[[int], Path] | None = None,
    progress: bool = True,
) -> None:
    """Write a finished sweep and its scores as one HTML file.

    Args:
        path: The file to write.
        record: The sweep's run.json.
        found: The scores. The seeds of a prompt are rows that follow one another. If the sweep ended early,
            there are fewer rows than in `record`.
        image_path: Returns the path of the image of a row with a set of layers skipped. For the empty set,
            that is the reference.
        words: What the page calls things.
        base_path: Returns the path of one more image of a row, shown beside its reference.
        progress: Whether to show a progress bar.

    Raises:
        InputError: An image cannot be read, or the file cannot be written.
    """
    settings, sets = record["settings"], found.sets
    entries = [
        (entry["prompt"], entry["seed"] + more)
        for entry in settings["prompts"]
        for more in range(settings.get("seeds", 1))
    ]
    page = fill_in(
        Path(__file__).with_name("report.html"),
        words=words,
        model=settings["model"],
        vital=layer_ranges(found.vital) or "none",
        num_vital=len(found.vital),
        noun="layers" if all(len(each.layers) == 1 for each in sets) else "sets of layers",
        protocol=_protocol(record, len(found.change), len(entries), words),
        versions=", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()),
        record=json.dumps(record, indent=2, ensure_ascii=False),
        sets=sets,
        classes=CLASSES,
        kinds=[kind for kind in KIND_COLOURS if any(each.kind == kind for each in sets)],
        has_intervals=any(each.interval for each in sets),
        chart=_chart(sets),
        gradient=", ".join(_colours(np.linspace(0, 1, 9), 0, 1)),
        limits=colour_limits(found.change),
        change_name=found.change_name,
        rows=_rows(found, entries, image_path, base_path, progress),
    )
    write_text(path, page)


def _rows(
    found: Findings,
    entries: Sequence[tuple[str, int]],
    image_path: Callable[[int, LayerSet], Path],
    base_path: Callable[[int], Path] | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Read the images of each row, and put them beside their changes and colours.

    Args:
        found: The scores.
        entries: Prompt and seed of each row, and of those that were not made.
        image_path: As for `write_report`.
        base_path: As for `write_report`.
        progress: As for `write_report`.
    """
    layer_sets = [REFERENCE, *(each.layers for each in found.sets)]
    limits, rows = colour_limits(found.change), []
    # One row at a time, since Ctrl-C waits for everything that the threads have been given.
    with ThreadPoolExecutor() as pool:
        shown = tqdm(entries[: len(found.change)], "report", unit="prompt", disable=not progress)
        for number, (prompt, seed) in enumerate(shown):
            paths = [image_path(number, layers) for layers in layer_sets]
            reference, *thumbnails = pool.map(embedded_thumbnail, paths)
            change = found.change[number]
            cells = list(zip(change.tolist(), _colours(change, **limits), thumbnails))
            row = {"prompt": prompt, "seed": seed, "reference": reference, "cells": cells}
            base = embedded_thumbnail(base_path(number)) if base_path else None
            rows.append({**row, "mean": change.mean(), "base": base})
    return rows


def fill_in(template: Path, **values: Any) -> str:
    """Fill in the Jinja template of an HTML page. Texts are escaped, and a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template.name).render(**values)


def _chart(sets: Sequence[ScoredSet]) -> dict[str, Any]:
    """Place the bars' parts in pixels from top to bottom. From left to right the page works in percents."""
    from matplotlib.ticker import MaxNLocator

    extent = [0.0, 1e-3, *(entry.vitality for entry in sets), *(end for entry in sets for end in entry.ends)]
    bottom, top = min(extent), max(extent)

    def y(value: float) -> float:
        return round(CHART_BOTTOM - (value - bottom) / (top - bottom) * (CHART_BOTTOM - CHART_TOP), 1)

    bars = []
    for entry in sets:
        low, high = entry.ends
        upper, lower = sorted((y(entry.vitality), y(0)))
        star = min(upper, y(high)) - 4
        bars.append({"top": upper, "height": lower - upper, "low": y(low), "high": y(high), "star": star})
    column = max(20, 7 * max(len(entry.label) for entry in sets) + 6)
    ticks = [tick for tick in MaxNLocator(5).tick_values(bottom, top) if bottom <= tick <= top]
    return {
        "height": CHART_HEIGHT,
        "label_y": CHART_BOTTOM + 20,
        "min_width": column * len(sets),
        "max_width": 3 * column * max(len(sets), 8),
        "zero": y(0),
        "ticks": [(y(tick), f"{tick:.3g}") for tick in ticks],
        "bars": bars,
    }


def _protocol(record: Mapping[str, Any], shown: int, planned: int, words: ReportWords) -> dict[str, Any]:
    """List how the images were made, without what is empty."""
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
        words.kept: settings.get("scale"),
        "prompts": prompts if shown == planned else f"{prompts}; ended after {shown} of {planned}",
        "encoder": settings.get("encoder"),
    }
    return {term: value for term, value in terms.items() if value not in (None, "")}


def _colours(values: np.ndarray, vmin: float, vmax: float) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[COLOUR_MAP]((values - vmin) / (vmax - vmin))]


def embedded_thumbnail(path: Path) -> Thumbnail:
    """Read an image file and make it small."""
    image = read_image(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="WEBP", quality=QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/webp;base64,{data}", image.width, image.height)
