"""Files that are written completely or not at all."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from flux.errors import InputError


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
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"Cannot write {path} ({reason}): make room or name another folder") from error
