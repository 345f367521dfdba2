"""The images of each browser session: one folder per session, with one folder per run in it."""

import json
import os
import shutil
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image

from flux.errors import InputError
from flux.files import write_json
from flux.images.given import Images, file_names
from flux.images.io import read_metadata, save_image
from flux.runs.record import image_metadata, run_record
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings
from flux.settings.edits import EditSettings
from flux.settings.files import FILES, check_settings, with_former_values

RUN_KINDS: dict[str, type[ModelSettings]] = {
    cls.demo: cls for cls in (GenerateSettings, LayerSettings, EditSettings)
}
MAX_SESSIONS = 200
KEEP_SECONDS = 24 * 3600  # from a folder's last use until it is deleted


@dataclass
class Run:
    """One run: a folder with its settings in run.json, and its images.

    Attributes:
        folder: The run's folder.
        settings: The run's settings, made `portable`.
        images: The file of each image by its name, in order.
        captions: The prompt of each image by its name.
    """

    folder: Path
    settings: ModelSettings
    images: dict[str, Path] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The run.json."""
        return self.folder / "run.json"

    def save(self, name: str, image: Image.Image, prompt: str, seed: int, **more: Any) -> Path:
        """Write an image that carries the run's settings, and return its path."""
        path = self.folder / f"{name}.png"
        save_image(image, path, image_metadata(self.settings, prompt, seed, **more))
        # New dictionaries: other threads may be reading these, and need a caption for each image.
        self.captions = {**self.captions, name: prompt}
        self.images = {**self.images, name: path}
        return path


@dataclass
class Session:
    """One browser session and its runs.

    Attributes:
        folder: The session's folder.
        runs: The session's runs, oldest first.
        stop: Set to cancel the session's run that is in progress.
        reference_id: The id of the kept reference on the session's mask canvas. None before the first one.
    """

    folder: Path
    runs: list[Run] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    reference_id: str | None = None

    def begin_run(self, settings: ModelSettings, inputs: Mapping[str, Images] | None = None) -> Run:
        """Start a run and write its run.json.

        Args:
            settings: The run's settings.
            inputs: Input images, or lists of them, by the settings field that names them. They are saved
                beside run.json.
        """
        number = int(self.runs[-1].folder.name[:3]) + 1 if self.runs else 0
        folder = self.folder / f"{number:03d}_{settings.demo}"
        files: dict[str, str | list[str]] = {}
        for name, given in (inputs or {}).items():
            is_one = isinstance(given, Image.Image)
            images, names = ([given], [f"{name}.png"]) if is_one else (given, file_names(name, len(given)))
            for image, file in zip(images, names, strict=True):
                save_image(image, folder / file)
            files[name] = names[0] if is_one else names
        run = Run(folder, check_settings(RUN_KINDS[settings.demo], portable(settings.to_json() | files)))
        write_json(run.record, run_record(run.settings))
        self.runs.append(run)
        return run

    def vital_scan(self, model: str) -> Path:
        """The vital_layers.json of this visit's last scan of a model. The file need not exist."""
        return self.folder / f"vital_layers_{model}.json"

    def remove(self, run: Run) -> None:
        """Delete a run."""
        shutil.rmtree(run.folder, ignore_errors=True)
        if run in self.runs:
            self.runs.remove(run)

    def make_room(self, most: int) -> None:
        """Delete the oldest runs until those of this visit take at most so many bytes."""
        sizes = [folder_bytes(run.folder) for run in self.runs]
        for run, size in zip(list(self.runs), sizes):
            if sum(sizes) <= most:
                break
            self.remove(run)
            sizes.remove(size)

    def keep_upload(self, image: Image.Image) -> Path:
        """Save an uploaded image as bare pixels, and return its path."""
        path = self.folder / "uploads" / f"{uuid4().hex}.png"
        save_image(image, path)
        return path

    def images(self) -> list[tuple[Run, str, Path]]:
        """List the run, name and file of every image, the newest run first."""
        return [(run, name, path) for run in reversed(self.runs) for name, path in run.images.items()]

    def zip(self) -> Path:
        """Write all files of all runs to one archive, and return its path.

        Raises:
            InputError: The session has no run yet.
        """
        if not self.runs:
            raise InputError("There is nothing to save yet: make an image first")
        path = self.folder / "visit.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for run in self.runs:
                for file in sorted(run.folder.rglob("*.*")):
                    archive.write(file, file.relative_to(self.folder))
        return path


class Sessions:
    """The sessions, by the browser's session hash.

    A session's folder is deleted KEEP_SECONDS after its last use: when the studio starts, and by `tidy`.
    Beyond MAX_SESSIONS, sessions that have made nothing are forgotten; others stay, however many ask.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        delete_unused(folder)

    def of(self, name: str | None) -> Session:
        """Return the session of that name, or start it. Its folder's name cannot be guessed."""
        with self._lock:
            session = self._sessions.pop(name or "", None)
            if session is None:
                session = Session(self.folder / uuid4().hex)
            elif session.folder.is_dir():
                os.utime(session.folder)
            self._sessions[name or ""] = session
            if len(self._sessions) > MAX_SESSIONS:
                self._forget_empty()
            return session

    def _forget_empty(self) -> None:
        """Forget the oldest sessions that have made nothing: names are free to make up."""
        empty = [name for name, session in self._sessions.items() if not session.folder.is_dir()]
        for name in empty[: len(self._sessions) - MAX_SESSIONS]:
            del self._sessions[name]

    def tidy(self) -> None:
        """Delete the folders that were not used for KEEP_SECONDS, and forget their sessions."""
        with self._lock:
            deleted = delete_unused(self.folder)
            for name in [name for name, session in self._sessions.items() if session.folder in deleted]:
                del self._sessions[name]

    def with_folder(self, folder: Path) -> Session | None:
        """Return a session that writes to this folder, or None if there is none."""
        with self._lock:
            return next((known for known in self._sessions.values() if known.folder == folder), None)


@dataclass
class Disk:
    """The disk space of everything that the studio writes, in bytes.

    Attributes:
        most: How much it may be.
        used: How much it is; counted now and then, and added to by uploads.
    """

    most: int = 20 * 2**30
    used: int = 0

    def has_room(self, size: int = 0) -> bool:
        """Tell whether so many bytes more may be written."""
        return self.used + size < self.most


def delete_unused(folder: Path, seconds: float = KEEP_SECONDS) -> set[Path]:
    """Delete the folders in `folder` that have not changed for so long, and return them."""
    oldest = time.time() - seconds
    unused = {path for path in folder.glob("*/") if path.stat().st_mtime < oldest}
    for path in unused:
        shutil.rmtree(path, ignore_errors=True)
    return unused


def folder_bytes(folder: Path) -> int:
    """Sum up the sizes of all files in a folder, in bytes."""

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:  # deleted meanwhile
            return 0

    return sum(size(path) for path in folder.rglob("*"))


def portable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Remove this machine's folders from settings in JSON's types.

    A file or folder of this machine is given by its bare name. `read_settings` then finds it beside the
    run.json, or where the demo runs.
    """

    def bare(path: Any) -> Any:
        if isinstance(path, list | tuple):
            return [bare(each) for each in path]
        return Path(os.path.abspath(path)).name if path and os.path.exists(path) else path

    kept = {name: bare(value) if name in FILES else value for name, value in fields.items()}
    kept["lora"] = [{**lora, "file": bare(lora["file"])} for lora in fields["lora"]]
    del kept["output_dir"]
    return kept


def read_back(path: Path) -> tuple[ModelSettings, dict[str, Any]]:
    """Read the settings in an image or a run.json of the studio or a demo.

    Returns:
        The settings, and what an image says of itself: "prompt", "seed", "layers" and "mask" (see
        `flux.studio.visits.unpack_mask`), as far as it has them.

    Raises:
        InputError: A file that is not ours, or that belongs to a demo without a tab on the page.
    """
    if path.suffix.lower() == ".json":
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"Got {path.name}, which is no JSON: give a run.json or an image") from error
    else:
        record = read_metadata(path)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        record = {}
    cls = RUN_KINDS.get(record["demo"]) if isinstance(record.get("demo"), str) else None
    if cls is None:
        raise InputError(f"Got {path.name}, which does not say how it was made: give an image made here")
    types = {"prompt": str, "seed": int, "layers": list, "mask": str}
    own = {name: record[name] for name, type_ in types.items() if isinstance(record.get(name), type_)}
    return check_settings(cls, with_former_values(cls, record["settings"]), path.name), own
