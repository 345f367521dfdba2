"""A run's output folder: resumed by the same settings, refused to others."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.errors import InputError
from flux.files import write_json
from flux.runs.record import run_record
from flux.settings.demos import Settings


@dataclass(frozen=True)
class ResumableFolder:
    """A folder in which a stopped run can be resumed, since its run.json says which settings made it.

    A run that makes images with a model calls `claim`, which writes the record of a new folder, and compares
    that of a `started` one. `remove_leftovers` is called before new files are written.

    Attributes:
        path: The folder. It need not exist yet.
        demo: The `demo` of the settings class whose runs it may hold.
        kind: What messages call such a run, e.g. "a sweep".
        program: What messages call the program that writes it, e.g. "demo_2_skip.py".
    """

    path: Path
    demo: str
    kind: str
    program: str

    @property
    def record_path(self) -> Path:
        """The run.json."""
        return self.path / "run.json"

    @property
    def started(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return self.record_path.exists()

    def claim(
        self,
        settings: Settings,
        free_fields: Collection[str],
        checkpoint: str | None,
        files: str = "weights",
    ) -> None:
        """Leave a record in a new folder, or check that the folder's run is this one.

        Args:
            settings: The settings of the run that is about to start.
            free_fields: As for `differences`.
            checkpoint: The fingerprint of the model's files: the same name may stand for another file by now.
                If None, or if it was not known at the first start, it is not compared.
            files: What the error calls files that differ.

        Raises:
            InputError: The run was made with other settings or other files, or as `record`.
        """
        if not self.started:
            self.write_record(settings, checkpoint=checkpoint)
            return
        differences, known = self.differences(settings, free_fields), self.record().get("checkpoint")
        if checkpoint and known and checkpoint != known:
            differences.add(files)
        self.refuse(differences)

    def record(self) -> dict[str, Any]:
        """Read the run.json.

        Raises:
            InputError: There is none, it is not JSON, or another demo wrote it.
        """
        if not self.record_path.is_file():
            raise InputError(
                f"Got {self.path}, which holds no run.json of {self.program}: give the folder that it wrote"
            )
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            demo, settings = record["demo"], record["settings"]
            if not isinstance(settings, dict):
                raise TypeError("its settings are no object")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"Got {self.record_path}, which cannot be read as {self.kind}'s: {error}"
            ) from error
        if demo != self.demo:
            raise InputError(
                f"Got {self.path}, a folder of demo {demo!r}, expected one of {self.program}: give another"
            )
        return record

    def differences(self, settings: Settings, free_fields: Collection[str]) -> set[str]:
        """Name the settings whose values differ from those in the run.json.

        Args:
            settings: The settings of the run that is about to start.
            free_fields: Names of fields that may differ, since they do not change the results.

        Raises:
            InputError: As `record`.
        """
        # What a record lacks is a field of a later version, which had its default.
        defaults = type(settings).model_construct().to_json()
        new, old = settings.to_json(), {**defaults, **self.record()["settings"]}
        names = (new.keys() | old.keys()) - set(free_fields)
        return {name for name in names if new.get(name) != old.get(name)}

    def refuse(self, differences: Collection[str]) -> None:
        """Raise InputError if there are differences: results of two different runs must not mix."""
        if differences:
            names = ", ".join(sorted(differences))
            raise InputError(
                f"Got {self.path}, which holds {self.kind} that differs in {names}: "
                "give another output_dir, or delete it"
            )

    def write_record(self, settings: Settings, **more: Any) -> None:
        """Write the run.json: the settings, the versions, and `more`."""
        write_json(self.record_path, run_record(settings, **more))

    def remove_leftovers(self) -> None:
        """Delete the partial files of a run that was killed while it wrote."""
        for leftover in self.path.rglob(".flux-*.tmp"):
            leftover.unlink(missing_ok=True)
