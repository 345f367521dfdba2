"""A report on LoRA files: what each one is, and how much it changes each layer, beside the vital layers."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.files import write_json, write_text
from flux.lora.contents import OpenLora, layer_name, open_loras
from flux.lora.norms import LayerChange, layer_changes
from flux.lora.pairs import ENCODERS
from flux.scan.layers import scored_sets
from flux.scan.plots import plot_vitality
from flux.scan.report import fill_in
from flux.weights.checkpoint import open_checkpoint

BAR = 14  # letters of the longest bar in the table
SHOWN_MODELS = 3


@dataclass(frozen=True, eq=False)
class LoraReport:
    """The facts about one LoRA file, and its change to each layer.

    Attributes:
        lora: The file.
        changes: Its change to each layer; that outside the layers comes last.
    """

    lora: OpenLora
    changes: list[LayerChange]

    @property
    def by_layer(self) -> dict[int | None, LayerChange]:
        """Its changes by layer."""
        return {change.layer: change for change in self.changes}

    @property
    def sizes(self) -> dict[int, float]:
        """The size of the change to each layer, as far as it is known."""
        return {c.layer: c.size for c in self.changes if c.layer is not None and c.size is not None}

    @property
    def is_relative(self) -> bool:
        """Whether sizes are relative to the model's weights."""
        return any(change.relative is not None for change in self.changes)

    def facts(self) -> dict[str, str]:
        """The facts about the file, in words."""
        lora, layers = self.lora, len(self.lora.layers)
        models = lora.models[:SHOWN_MODELS]
        more = len(lora.models) - len(models)
        ranks = sorted({rank for change in self.changes for rank in change.ranks})
        alphas = sorted({alpha for change in self.changes for alpha in change.alphas})
        found = {
            "form": lora.form,
            "names": lora.names,
            "trainer": lora.trainer or "not told",
            "fits": ", ".join(models) + (f" and {more} more" if more else ""),
            "layers": f"{layers} of {lora.num_layers}",
            "rank": _numbers(ranks),
            "alpha": _numbers(alphas),
            "bytes": f"{sum(header.size for header in lora.file.checkpoint.headers):,}",
            "text encoders": ", ".join(f"{ENCODERS[part]} {n}" for part, n in lora.text_encoders.items()),
        }
        return {key: value for key, value in found.items() if value} | lora.telling_metadata()

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        lora, num_double = self.lora, self.lora.params.depth
        changes = {
            "outside" if change.layer is None else f"{change.layer:02d}": {
                "name": layer_name(change.layer, num_double),
                "matrices": change.matrices,
                "ranks": list(change.ranks),
                "alphas": list(change.alphas),
                "norm": change.norm,
                "relative": change.relative,
            }
            for change in self.changes
        }
        return {
            "file": str(lora.path),
            "models": list(lora.models),
            "form": lora.form,
            "names": lora.names,
            "trainer": lora.trainer,
            "text_encoders": lora.text_encoders,
            "metadata": lora.file.checkpoint.metadata,
            "layers": changes,
        }


def look_into(
    files: Sequence[str | Path], base: str | Path | None = None, progress: bool = False
) -> list[LoraReport]:
    """Read what LoRA files change.

    Args:
        files: LoRA files for models of the same sizes.
        base: File or folder of the transformer that they were made for. If None, norms are not relative to
            its weights.
        progress: Whether to show progress bars.

    Raises:
        InputError: A file cannot be read, is no LoRA, or is for another model than the others.
    """
    opened, checkpoint = open_loras(files), open_checkpoint(Path(base), "transformer") if base else None
    return [LoraReport(lora, layer_changes(lora, checkpoint, progress)) for lora in opened]


def report_text(reports: Sequence[LoraReport]) -> str:
    """Write a report for a console: the facts of each LoRA, then a line for each layer."""
    lines = []
    for number, report in enumerate(reports, start=1):
        lines.append(f"{number}  {report.lora.path}" if len(reports) > 1 else str(report.lora.path))
        lines += [f"   {key}: {value}" for key, value in report.facts().items()]
    heads = ["size"] if len(reports) == 1 else [f"size {number + 1}" for number in range(len(reports))]
    lines += ["", f"layer  name       vital  {''.join(f'{head:28}' for head in heads)}".rstrip()]
    for row in layer_rows(reports):
        cells = [
            f"{cell.text:>9} {'█' * max(round(BAR * cell.share), cell.share > 0):{BAR}}    "
            for cell in row.cells
        ]
        lines.append(f"{row.label:>5}  {row.name:9}  {'★' * row.is_vital:5}  {''.join(cells)}".rstrip())
    lines += ["", size_text(reports)]
    return "\n".join(lines)


def size_text(reports: Sequence[LoraReport]) -> str:
    """Say what the sizes are."""
    text = "size: Frobenius norm of the change to the layer's weights at strength 1"
    if reports[0].is_relative:
        text += ", in percent of the norm of these weights"
    if any(change.norm is None for report in reports for change in report.changes):
        text += "; - is not known without the model's weights (--base)"
    return text


@dataclass(frozen=True)
class Cell:
    """One LoRA's change to one layer, as a table shows it.

    Attributes:
        text: Its size in letters.
        share: Its size as a fraction of the largest one of the LoRA's layers, at most 1.
        change: The change, or None if the LoRA leaves the layer as it is.
    """

    text: str
    share: float
    change: LayerChange | None


@dataclass(frozen=True)
class Row:
    """One layer, as a table shows it."""

    label: str
    name: str
    is_vital: bool
    cells: list[Cell]


def layer_rows(reports: Sequence[LoraReport]) -> list[Row]:
    """A row for each of the model's layers, then one for what is outside the layers, if that is changed."""
    first = reports[0].lora
    layers: list[int | None] = [*range(first.num_layers)]
    if any(None in report.by_layer for report in reports):
        layers.append(None)
    return [
        Row(
            "" if layer is None else str(layer),
            layer_name(layer, first.params.depth),
            layer in first.vital_layers,
            [_cell(report, layer) for report in reports],
        )
        for layer in layers
    ]


def _cell(report: LoraReport, layer: int | None) -> Cell:
    change = report.by_layer.get(layer)
    if change is None:
        return Cell("", 0.0, None)
    if change.size is None:
        return Cell("-", 0.0, change)
    largest = max(report.sizes.values(), default=0.0) or 1.0
    text = f"{change.size:.4g}" if change.relative is None else f"{100 * change.size:.3f} %"
    return Cell(text, min(1.0, change.size / largest), change)


def write_report(folder: str | Path, reports: Sequence[LoraReport]) -> Path:
    """Write report.json, report.html, and a bar chart of each LoRA.

    Args:
        folder: The folder to write to.
        reports: The LoRAs.

    Returns:
        The path of report.html.

    Raises:
        InputError: A file cannot be written.
    """
    folder, first = Path(folder), reports[0].lora
    charts = [
        _chart(report, folder / f"norms_{number}.png") for number, report in enumerate(reports, start=1)
    ]
    data = {
        "format": 1,
        "num_double": first.params.depth,
        "num_single": first.params.depth_single_blocks,
        "vital_layers": list(first.vital_layers),
        "loras": [report.to_json() for report in reports],
    }
    write_json(folder / "report.json", data)
    page = fill_in(
        Path(__file__).with_name("report.html"),
        reports=reports,
        charts=charts,
        rows=layer_rows(reports),
        size_text=size_text(reports),
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _chart(report: LoraReport, path: Path) -> str | None:
    """Write the bar chart of a LoRA's sizes, and return it as a data URL. None if no size is known."""
    if not report.sizes:
        return None
    unit, measure = (100, "change, % of the weights") if report.is_relative else (1, "norm of the change")
    sizes = {(layer,): unit * size for layer, size in report.sizes.items()}
    bars = scored_sets(sizes, report.lora.params.depth, report.lora.vital_layers)
    plot_vitality(bars, path, measure=measure, axis="layer")
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _numbers(values: Sequence[float]) -> str:
    if len(values) > 4:
        return f"{values[0]:g} to {values[-1]:g}"
    return ", ".join(f"{value:g}" for value in values)
