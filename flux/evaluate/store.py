"""The folder of an evaluation: its rows, its edits, and what it refuses."""

import csv
import hashlib
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from flux.errors import InputError
from flux.evaluate.benchmark import fingerprint
from flux.evaluate.methods import Made
from flux.evaluate.settings import EvaluateSettings
from flux.files import write_json, write_text
from flux.images.io import read_image
from flux.metrics.edits import NETS, OUTSIDE
from flux.runs.record import run_record
from flux.settings.complete import complete
from flux.weights.find import checkpoint_of

Row = dict[str, str | float | None]


# These may change between the starts of one evaluation: they do not change what is measured.
FREE_FIELDS = {
    "output_dir", "benchmark", "batch_size", "device", "offload", "compile", "workers", "ray_address",
    "kinds", "count", "methods", "metadata", "judge",
}  # fmt: skip
# These may as well, since all is measured again then.
MEASURED_BY = {"judge_file", "metrics", "encoder", "clip"}
TEXTS = ("item", "kind", "method")
JUDGED = ("success", "overlap")


def columns(settings: EvaluateSettings) -> list[str]:
    """Of results.csv."""
    nets = [column for name in settings.metrics for column in NETS[name]]
    return [*TEXTS, *(JUDGED if settings.judge else ()), *OUTSIDE, *nets, "seconds", "evaluations"]


class Store:
    """The folder of an evaluation.

    Attributes:
        rows: of results.csv, by method and item, as far as their pictures are there.
        outdated: whether the rows there were measured by another judge or other metrics.

    Raises:
        InputError: it holds one that was made with other settings.
    """

    def __init__(self, settings: EvaluateSettings):
        self.folder, self.columns = Path(settings.output_dir), columns(settings)
        self.rows: dict[tuple[str, str], Row] = {}
        self.settings, self.outdated = settings, False
        self.generated = settings.references == "generated"
        judge = Path(settings.judge or "")
        self.record = {
            "checkpoint": checkpoint_of(complete(settings)),
            "edits": fingerprint(settings.benchmark),
            "judge_file": hashlib.sha256(judge.read_bytes()).hexdigest()[:16] if judge.is_file() else None,
        }
        if (self.folder / "run.json").exists():
            self._check()
        if (self.folder / "results.csv").exists():
            self._read()

    def begin(self) -> None:
        """Leaves its settings there, once all else that may be wrong is known to be right."""
        write_json(self.folder / "run.json", run_record(self.settings, **self.record))
        for leftover in self.folder.rglob(".flux-*.tmp"):  # of a start that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def _check(self) -> None:
        path = self.folder / "run.json"
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            fields, demo = there["settings"], there["demo"]
            earlier = [*there.get("earlier_methods", []), *fields.get("methods", [])]
            old = {method["name"]: method for method in earlier}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"Got {path}, which cannot be read as an evaluation's: {error}") from error
        own = self.settings.to_json()
        differ = {
            name for name in own.keys() | fields.keys() if own.get(name) != fields.get(name)
        } - FREE_FIELDS
        # Methods may come and go, but a name stands for one method.
        differ |= {f"method {m['name']!r}" for m in own["methods"] if old.get(m["name"], m) != m}
        differ |= {name for name, value in self.record.items() if there.get(name) != value}
        self.outdated, differ = bool(differ & MEASURED_BY), differ - MEASURED_BY
        if demo != self.settings.demo or differ:
            raise InputError(
                f"Got {self.folder}, which holds an evaluation with another {', '.join(sorted(differ))}: "
                "give another output_dir, or delete it"
            )
        # Those that are left out this time still have their rows.
        now = {method["name"] for method in own["methods"]}
        self.record["earlier_methods"] = [method for name, method in old.items() if name not in now]

    def _read(self) -> None:
        with open(self.folder / "results.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                own = (row["method"], row["item"])
                pictures = [self.picture(*own), self.picture(*own, reference=self.generated)]
                if all(picture.is_file() for picture in pictures):
                    row |= {n: float(v) if v else None for n, v in row.items() if n not in TEXTS}
                    self.rows[own] = row

    def made(self, method: str, key: str) -> Made:
        """An edit that is there."""
        row, picture = self.rows[method, key], read_image(self.picture(method, key))
        reference = read_image(self.picture(method, key, reference=True)) if self.generated else None
        return Made(picture, reference, row["seconds"], row["evaluations"])

    def picture(self, method: str, key: str, reference: bool = False) -> Path:
        return self.folder / method / (f"{key}_reference.png" if reference else f"{key}.png")

    def add(self, rows: Sequence[Row]) -> None:
        """Once their pictures are there."""
        self.rows |= {(row["method"], row["item"]): row for row in rows}
        text = StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        write_text(self.folder / "results.csv", text.getvalue())
