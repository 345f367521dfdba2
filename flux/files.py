"""Files that are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from flux.errors import InputError


def check_folder(folder: str | Path) -> None:
    """Check that files can be written to a folder. It is not created yet.

    Raises:
        InputError: A file stands in the way, or there is no permission to write.
    """
    there = Path(folder).absolute()
    try:
        while not there.exists():
            there = there.parent
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise _not_writable(folder, error) from error
    if not there.is_dir():
        raise InputError(f"Cannot write to {folder} ({there} is a file): name another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"Cannot write to {folder} (no permission in {there}): name another folder")


def write_json(path: str | Path, data: Any) -> None:
    """Writes indented JSON. Raises InputError as `write_bytes`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file. Raises InputError as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file, and its folder if there is none. At any moment, either the old or the new file is there.

    Raises:
        InputError: The file cannot be written (full disk, no permission, ...). The old file is then left
            unchanged, and no other file is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".flux-{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: str | Path, error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(f"Cannot write {path} ({reason}): make room or name another folder")
