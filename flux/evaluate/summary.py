"""Sums an evaluation up in tables.

summary.csv has the mean of every measure for each method and kind of edit. summary.md shows the important
ones.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from flux.files import write_text

SCENE = ("background", "time", "style")  # kinds of edits that change the whole image
KEPT = 25.0  # dB outside the mask: from here on, what an edit should keep looks kept
CELL = ("success", "psnr", "both", "overlap")  # the measures in the table by kind
# The columns of summary.md: title, factor (those of PIE-Bench's tables), digits.
SHOWN = {
    "success": ("success", 1, 2),
    "both": (f"and {KEPT:g} dB", 1, 2),
    "overlap": ("overlap", 1, 2),
    "psnr": ("PSNR", 1, 2),
    "pie_psnr": ("PIE PSNR", 1, 2),
    "pie_mse": ("PIE MSE 10^4", 1e4, 1),
    "ssim": ("SSIM 10^2", 1e2, 2),
    "structure": ("structure 10^3", 1e3, 2),
    "lpips": ("LPIPS 10^3", 1e3, 1),
    "clip": ("CLIP", 1, 2),
    "clip_edited": ("CLIP edited", 1, 2),
    "clip_direction": ("CLIP direction", 1, 3),
    "mask_iou": ("mask IoU", 1, 2),
    "seconds": ("s", 1, 2),
    "evaluations": ("evaluations", 1, 0),
}
NOTES = f"""PSNR: dB over the pixels that the edit should keep. PIE PSNR, PIE MSE, SSIM and LPIPS: as in
PIE-Bench's tables, of whole images whose edited part is black in both. "and {KEPT:g} dB": success with at
least that PSNR. Overlap: of the subjects before and after. Mask IoU: of the tokens of the automatic mask
and those that the benchmark's mask touches. s and evaluations of the transformer: an edit's
share of its batch. Local: edits of a part of the image, not of its place, time or style.
"""


@dataclass(frozen=True)
class ResultRow:
    """One row of results.csv: the measures of one method's edit of one item.

    Attributes:
        item: The item's key in the benchmark.
        kind: The kind of edit.
        method: The method's slug.
        scores: The measures by name. A score is None if the measure does not apply.
    """

    item: str
    kind: str
    method: str
    scores: Mapping[str, float | None]


def means(rows: Sequence[ResultRow]) -> dict[str, float]:
    """Average each measure over the rows that have it. A measure that no row has is left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.scores.items():
            if value is not None:
                values.setdefault(name, []).append(value)
        success, psnr = row.scores.get("success"), row.scores.get("psnr")
        if success is not None and psnr is not None:
            values.setdefault("both", []).append(float(success > 0 and psnr >= KEPT))
    return {name: sum(each) / len(each) for name, each in values.items()}


def means_by_kind(rows: Sequence[ResultRow]) -> dict[str, dict[str, float]]:
    """Average the measures of each kind of edit, in the order in which the kinds come.

    The first entries are "all" and, if some kinds change the whole image, "local": the edits of other kinds.
    Each entry has the number of edits as "items".
    """
    groups: dict[str, list[ResultRow]] = {"all": list(rows)}
    if any(row.kind in SCENE for row in rows):
        groups["local"] = [row for row in rows if row.kind not in SCENE]
    for row in rows:
        groups.setdefault(row.kind, []).append(row)
    return {kind: {"items": len(group)} | means(group) for kind, group in groups.items() if group}


def write_summary(folder: Path, rows: Mapping[str, Sequence[ResultRow]]) -> None:
    """Write summary.csv and summary.md from the rows of each method, by its name.

    Raises:
        InputError: As `write_text`.
    """
    tables = {method: means_by_kind(own) for method, own in rows.items()}
    names = [name for name in SHOWN if any(name in kinds["all"] for kinds in tables.values())]
    others = dict.fromkeys(name for kinds in tables.values() for name in kinds["all"] if name not in SHOWN)
    text = StringIO()
    columns = dict.fromkeys(["method", "kind", "items", *names, *others])
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for method, kinds in tables.items():
        writer.writerows({"method": method, "kind": kind, **values} for kind, values in kinds.items())
    write_text(folder / "summary.csv", text.getvalue())
    write_text(folder / "summary.md", markdown(tables, names))


def markdown(tables: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Format one table of the named measures and one of the important ones by kind of edit.

    Args:
        tables: The means of `means_by_kind`, by the method's name.
        names: The measures to show, out of `SHOWN`.
    """

    def cell(values: Mapping[str, float], name: str) -> str:
        _, factor, digits = SHOWN[name]
        return f"{factor * values[name]:.{digits}f}" if name in values else ""

    lines = _line("method", *(SHOWN[name][0] for name in names)) + _line(*["---"] * (len(names) + 1))
    for method, kinds in tables.items():
        lines += _line(method, *(cell(kinds["all"], name) for name in names))
    kinds = [kind for kind in next(iter(tables.values())) if kind != "all"]
    important = [name for name in CELL if name in names]
    if len(kinds) > 1 and important:
        lines += f"\n{' / '.join(SHOWN[name][0] for name in important)} by kind of edit:\n\n"
        lines += _line("method", *kinds) + _line(*["---"] * (len(kinds) + 1))
        for method, own in tables.items():
            cells = (" / ".join(cell(own[kind], name) or "-" for name in important) for kind in kinds)
            lines += _line(method, *cells)
    return f"{lines}\n{NOTES}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
