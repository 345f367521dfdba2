"""The outcome of an evaluation as tables: summary.csv with the mean of every measure for each method and kind
of edit, summary.md with what tells most.
"""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path

from flux.files import write_text

Row = Mapping[str, str | float | None]

SCENE = ("background", "time", "style")  # kinds of edits that change all of a picture, the others a part
KEPT = 25.0  # dB outside the mask: from there on, what an edit should keep looks kept
CELL = ("success", "psnr", "both", "overlap")  # of the table by kind
# In summary.md: title, factor (those of PIE-Bench's tables), digits.
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
    "seconds": ("s", 1, 2),
    "evaluations": ("evaluations", 1, 0),
}
NOTES = f"""PSNR: dB over the pixels that the edit should keep. PIE PSNR, PIE MSE, SSIM and LPIPS: as in
PIE-Bench's tables, of whole pictures whose edited part is black in both. "and {KEPT:g} dB": success with at
least that PSNR. Overlap: of the subjects before and after. s and evaluations of the transformer: an edit's
share of its batch. Local: edits of a part of the picture, not of its place, time or style.
"""


def means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of each measure over the rows that have it; those that none has are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        row = dict(row)
        if row.get("success") is not None and row["psnr"] is not None:
            row["both"] = float(row["success"] and row["psnr"] >= KEPT)
        for name, value in row.items():
            if isinstance(value, int | float):
                values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def by_kind(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """The means of "all" edits, of the "local" ones if there are others, and of each kind, in the order in
    which the kinds come; with the number of edits as "items".
    """
    groups: dict[str, list[Row]] = {"all": list(rows)}
    if any(row["kind"] in SCENE for row in rows):
        groups["local"] = [row for row in rows if row["kind"] not in SCENE]
    for row in rows:
        groups.setdefault(row["kind"], []).append(row)
    return {kind: {"items": len(own)} | means(own) for kind, own in groups.items() if own}


def write_standings(folder: Path, rows: Mapping[str, Sequence[Row]]) -> None:
    """Writes summary.csv and summary.md of each method's rows. Raises InputError as `write_text`."""
    found = {method: by_kind(own) for method, own in rows.items()}
    names = [name for name in SHOWN if any(name in kinds["all"] for kinds in found.values())]
    extra = dict.fromkeys(name for kinds in found.values() for name in kinds["all"] if name not in SHOWN)
    text = StringIO()
    columns = dict.fromkeys(["method", "kind", "items", *names, *extra])
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for method, kinds in found.items():
        writer.writerows({"method": method, "kind": kind, **values} for kind, values in kinds.items())
    write_text(folder / "summary.csv", text.getvalue())
    write_text(folder / "summary.md", markdown(found, names))


def markdown(found: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """One table of all measures, one of the most telling by kind of edit."""

    def cell(values: Mapping[str, float], name: str) -> str:
        _, factor, digits = SHOWN[name]
        return f"{factor * values[name]:.{digits}f}" if name in values else ""

    lines = _row("method", *(SHOWN[name][0] for name in names)) + _row(*["---"] * (len(names) + 1))
    for method, kinds in found.items():
        lines += _row(method, *(cell(kinds["all"], name) for name in names))
    kinds = [kind for kind in next(iter(found.values())) if kind != "all"]
    telling = [name for name in CELL if name in names]
    if len(kinds) > 1 and telling:
        lines += f"\n{' / '.join(SHOWN[name][0] for name in telling)} by kind of edit:\n\n"
        lines += _row("method", *kinds) + _row(*["---"] * (len(kinds) + 1))
        for method, own in found.items():
            cells = (" / ".join(cell(own[kind], name) or "-" for name in telling) for kind in kinds)
            lines += _row(method, *cells)
    return f"{lines}\n{NOTES}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
