"""Files written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from flux.errors import InputError


def write_json(path: str | Path, data: Any) -> None:
    """Writes `data` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file, making its folder if need be; at every moment the older or the new one is there whole.

    Raises InputError if that fails (full disk, no permission, ...); the older file then stays and no other is
    left behind.
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
        reason = error.strerror.lower()
        raise InputError(f"Cannot write {path} ({reason}): make room or name another folder") from error
