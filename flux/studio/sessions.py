"""What a visitor has made: a folder for each visit, one in it for each run."""

import json
import os
import shutil
import threading
import time
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from flux.errors import InputError
from flux.files import write_json
from flux.images.io import read_metadata, save_image
from flux.runs.record import about, run_record
from flux.settings.demos import EditSettings, LayerSettings, Settings, TestSettings
from flux.settings.files import WEIGHTS, check_settings

KINDS: dict[str, type[Settings]] = {cls.demo: cls for cls in (TestSettings, LayerSettings, EditSettings)}
REMEMBERED = 200  # visits at once
KEPT = 24 * 3600  # seconds from a folder's last use until it is deleted


@dataclass
class Run:
    """One run: its settings as run.json in its folder, and its pictures by name, in order.

    Attributes:
        settings: as `portable` has them.
    """

    folder: Path
    settings: Settings
    pictures: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        return self.folder / "run.json"

    def save(self, name: str, picture: Image.Image, prompt: str, seed: int, **more: Any) -> Path:
        """Adds a picture that carries the run's settings."""
        path = self.folder / f"{name}.png"
        save_image(picture, path, about(self.settings, prompt, seed, **more))
        self.pictures[name], self.captions[name] = path, prompt
        return path


@dataclass
class Visit:
    """Attributes:
    stop: set to stop this visitor's run, also one that waits for its turn.
    busy: whether one runs.
    """

    folder: Path
    runs: list[Run] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    busy: bool = False

    def begin(self, settings: Settings, inputs: dict[str, Image.Image] | None = None) -> Run:
        """A new run, its run.json written. `inputs` are pictures that go in, by the field that names them."""
        folder = self.folder / f"{len(self.runs):03d}_{settings.demo}"
        names = {name: f"{name}.png" for name in inputs or {}}
        for name, picture in (inputs or {}).items():
            save_image(picture, folder / names[name])
        run = Run(folder, check_settings(type(settings), portable(settings.to_json() | names)))
        write_json(run.record, run_record(run.settings))
        self.runs.append(run)
        return run

    def take(self, picture: Image.Image) -> Path:
        """Keeps an upload, as bare pixels."""
        path = self.folder / "uploads" / f"{uuid4().hex}.png"
        save_image(picture, path)
        return path

    def pictures(self) -> list[tuple[Run, str, Path]]:
        """All there are, the newest run first."""
        return [(run, name, path) for run in reversed(self.runs) for name, path in run.pictures.items()]

    def zip(self) -> Path:
        """Everything made so far as one file. Raises InputError if there is nothing."""
        if not self.runs:
            raise InputError("There is nothing to save yet: make a picture first")
        path = self.folder / "visit.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for run in self.runs:
                for file in sorted(run.folder.rglob("*.*")):
                    archive.write(file, file.relative_to(self.folder))
        return path


class Visits:
    """The visits of the last visitors, by what their browser calls itself.

    What was made in a visit is deleted KEPT seconds after its last use, when the studio starts and whenever
    a new visit begins.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._visits: OrderedDict[str, Visit] = OrderedDict()
        self._lock = threading.Lock()
        delete_unused(folder)

    def of(self, name: str | None) -> Visit:
        """The visit of that name, made if need be. Its folder's name cannot be guessed."""
        with self._lock:
            visit = self._visits.pop(name or "", None)
            if visit is None:
                gone = delete_unused(self.folder)
                self._visits = OrderedDict(
                    (other, known) for other, known in self._visits.items() if known.folder not in gone
                )
                visit = Visit(self.folder / uuid4().hex)
            elif visit.folder.is_dir():
                os.utime(visit.folder)
            self._visits[name or ""] = visit
            while len(self._visits) > REMEMBERED:
                self._visits.popitem(last=False)
            return visit


def delete_unused(folder: Path) -> set[Path]:
    """Deletes the folders in `folder` that have not changed for KEPT seconds, and returns them."""
    last = time.time() - KEPT
    old = {path for path in folder.glob("*/") if path.stat().st_mtime < last}
    for path in old:
        shutil.rmtree(path, ignore_errors=True)
    return old


def portable(fields: dict[str, Any]) -> dict[str, Any]:
    """Settings in JSON's types that name no folder of this machine: what lies here stands there by its bare
    name, by which `read_settings` finds it beside the run.json or where the demo runs.
    """

    def bare(path: str | None) -> str | None:
        return Path(os.path.abspath(path)).name if path and os.path.exists(path) else path

    kept = {name: bare(value) if name in WEIGHTS else value for name, value in fields.items()}
    kept["lora"] = [{**lora, "file": bare(lora["file"])} for lora in fields["lora"]]
    del kept["output_dir"]
    return kept


def read_back(path: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings in a picture or a run.json of ours, and what a picture says of itself ("prompt", "seed",
    "layers").

    Raises:
        InputError: a file of others, or of a kind that has no place on the page.
    """
    if path.suffix.lower() == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"Got {path.name}, which is no JSON: give a run.json or a picture") from error
    else:
        record = read_metadata(path)
    kind = record.get("demo") if isinstance(record, dict) else None
    if kind not in KINDS or not isinstance(record.get("settings"), dict):
        raise InputError(f"Got {path.name}, which does not say how it was made: give a picture made here")
    kinds = {"prompt": str, "seed": int, "layers": list}
    about = {name: record[name] for name, kind in kinds.items() if isinstance(record.get(name), kind)}
    return check_settings(KINDS[kind], record["settings"], path.name), about
