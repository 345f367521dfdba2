"""Keeps an evaluation's folder: rows and edits that are done, and whether new settings may add to them."""

import csv
import hashlib
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from PIL import Image

from flux.errors import InputError, reason_of
from flux.evaluate.benchmark import benchmark_fingerprint
from flux.evaluate.methods import EditResult
from flux.evaluate.resolve import ResolvedEvaluate
from flux.evaluate.settings import EvaluateSettings
from flux.evaluate.summary import ResultRow
from flux.files import write_text
from flux.images.io import read_image
from flux.metrics.edits import NETS, OUTSIDE
from flux.runs.folder import ResumableFolder
from flux.settings.complete import resolve
from flux.weights.find import checkpoint_of
from flux.weights.open_model import OpenModel

# These may change when an evaluation is resumed, since no measured value depends on them.
FREE_FIELDS = {
    "output_dir", "benchmark", "batch_size", "device", "offload", "compile", "workers", "ray_address",
    "kinds", "count", "methods", "metadata", "judge",
}  # fmt: skip
# These may change as well, since then all edits are measured again.
MEASURED_BY = {"judge_file", "metrics", "encoder", "clip"}
TEXTS = ("item", "kind", "method")
JUDGED = ("success", "overlap")


def columns(settings: EvaluateSettings) -> list[str]:
    """List the columns of results.csv."""
    by_model = [column for name in settings.metrics for column in NETS[name]]
    return [
        *TEXTS,
        *(JUDGED if settings.judge else ()),
        *OUTSIDE,
        *by_model,
        "seconds",
        "evaluations",
        "mask_iou",
    ]


class Store:
    """The folder of an evaluation.

    Args:
        settings: The settings of the evaluation.
        opened: The model's files, if they are open already.

    Attributes:
        rows: The rows of results.csv whose images exist, by method and item.
        outdated: Whether another judge or other metrics measured them.

    Raises:
        InputError: The folder holds an evaluation that was made with other settings.
    """

    def __init__(self, settings: ResolvedEvaluate, opened: OpenModel | None = None):
        self.path, self.columns = Path(settings.output_dir), columns(settings)
        self.folder = ResumableFolder(self.path, settings.demo, "an evaluation", "python -m flux.evaluate")
        self.rows: dict[tuple[str, str], ResultRow] = {}
        self.settings, self.outdated = settings, False
        self.generated = settings.references == "generated"
        judge = Path(settings.judge or "")
        self.record: dict[str, Any] = {
            "checkpoint": opened.fingerprint() if opened else checkpoint_of(resolve(settings)),
            "edits": benchmark_fingerprint(settings.benchmark),
            "judge_file": hashlib.sha256(judge.read_bytes()).hexdigest()[:16] if judge.is_file() else None,
        }
        if self.folder.started:
            self._check()
        if (self.path / "results.csv").exists():
            self._read()

    def begin(self) -> None:
        """Write run.json. Called once everything else that may be wrong is known to be right."""
        self.folder.write_record(self.settings, **self.record)
        self.folder.remove_leftovers()

    def _check(self) -> None:
        record, methods = self.folder.record(), self.settings.to_json()["methods"]
        try:
            earlier = [*record.get("earlier_methods", []), *record["settings"].get("methods", [])]
            old = {method["name"]: method for method in earlier}
        except (KeyError, TypeError) as error:
            path = self.folder.record_path
            raise InputError(f"Got {path}, which cannot be read as an evaluation's: {error}") from error
        differ = self.folder.differences(self.settings, FREE_FIELDS)
        # Methods may come and go, but a name stands for one method.
        differ |= {f"method {m['name']!r}" for m in methods if old.get(m["name"], m) != m}
        differ |= {name for name, value in self.record.items() if record.get(name) != value}
        self.outdated = bool(differ & MEASURED_BY)
        self.folder.refuse(differ - MEASURED_BY)
        # Methods that are left out this time still have their rows.
        names = {method["name"] for method in methods}
        self.record["earlier_methods"] = [method for name, method in old.items() if name not in names]

    def _read(self) -> None:
        """Read results.csv. Rows whose images are gone are left out."""
        path = self.path / "results.csv"
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = [_row(fields) for fields in csv.DictReader(file)]
        except (ValueError, csv.Error) as error:
            raise InputError(
                f"Got {path}, which is not as an evaluation writes it ({reason_of(error)}): put it right, or "
                "remove it to make all edits again"
            ) from error
        for row in rows:
            images = [self.image(row.method, row.item, reference) for reference in {False, self.generated}]
            if all(image.is_file() for image in images):
                self.rows[row.method, row.item] = row

    def result(self, method: str, key: str) -> EditResult:
        """Read an edit that is done. Raise InputError as `read`."""
        scores, image = self.rows[method, key].scores, self.read(method, key)
        reference = self.read(method, key, reference=True) if self.generated else None
        # Rows of an earlier version have no IoU.
        return EditResult(image, reference, scores["seconds"], scores["evaluations"], scores.get("mask_iou"))

    def image(self, method: str, key: str, reference: bool = False) -> Path:
        """Name the file of an edit, or of the generated reference it was made from."""
        return self.path / method / (f"{key}_reference.png" if reference else f"{key}.png")

    def read(self, method: str, key: str, reference: bool = False) -> Image.Image:
        """Read an edit, or its generated reference. Raise InputError if the file is damaged."""
        path = self.image(method, key, reference)
        try:
            return read_image(path)
        except InputError as error:
            raise InputError(f"{error}. Remove {path}, and the next start makes it again") from error

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Add rows and write results.csv. The rows' images must exist already."""
        self.rows |= {(row.method, row.item): row for row in rows}
        text = StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows.values():
            writer.writerow({"item": row.item, "kind": row.kind, "method": row.method, **row.scores})
        write_text(self.path / "results.csv", text.getvalue())


def _row(fields: dict[str, str]) -> ResultRow:
    """Read a row of results.csv.

    Raises:
        ValueError: A column is missing, the row has more or fewer fields than there are columns, or a score
            is no number.
    """
    needed = (*TEXTS, *OUTSIDE, "seconds", "evaluations")
    if missing := next((name for name in needed if name not in fields), None):
        raise ValueError(f"it has no column {missing}")
    item, kind, method = (fields.pop(name) for name in TEXTS)
    if None in (*fields, *fields.values()):
        raise ValueError(f"the row of {item} has too many or too few fields")
    scores = {name: float(text) if text else None for name, text in fields.items()}
    return ResultRow(item, kind, method, scores)
