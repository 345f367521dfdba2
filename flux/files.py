"""Files that are written completely or not at all."""

import atexit
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from flux.errors import InputError, launched

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEAST_ROOM = 2**20
"""Bytes that must be free on a disk before a run starts to fill it."""

_claimed: dict[Path, int] = {}  # the open folders that this process has locked


def check_folder(folder: str | Path) -> None:
    """Check that files can be written to a folder. It is not created yet.

    Raises:
        InputError: A file stands in the way, there is no permission to write, or the disk is full.
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
    usage = shutil.disk_usage(there)
    if usage.total and usage.free < LEAST_ROOM:  # some file systems tell no sizes
        raise InputError(f"Cannot write to {folder} (the disk is full): make room or name another folder")


def claim_folder(folder: str | Path) -> None:
    """Keep other processes from writing the same results to a folder, until this process ends.

    The folder is created, and removed if it is empty when the process ends. Of torchrun's processes, the
    first claims it for all. Where the system has no locks for folders, nothing is kept away.

    Raises:
        InputError: Another process has claimed it, or as `check_folder`.
    """
    check_folder(folder)
    path = Path(folder).resolve()
    if fcntl is None or path in _claimed or (launched() and os.environ["RANK"] != "0"):
        return
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(
            f"Cannot write to {folder} (another run is writing to it): wait for it or name another folder"
        ) from None
    except OSError:  # some network file systems have no locks
        os.close(lock)
        return
    _claimed[path] = lock
    if is_new:
        atexit.register(_remove_if_empty, path)


def _remove_if_empty(path: Path) -> None:
    with suppress(OSError):
        path.rmdir()


def write_json(path: str | Path, data: Any) -> None:
    """Write indented JSON. Raises InputError as `write_bytes`."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file. Raises InputError as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises InputError as `write_file`."""
    write_file(path, lambda partial: partial.write_bytes(data))


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file, and its folder if there is none. At any moment, either the old or the new file is there.

    Args:
        path: The file.
        write: Writes the content to the path that it is called with. It may raise OSError.

    Raises:
        InputError: The file cannot be written (full disk, no permission, ...). The old file is then left
            unchanged, and no other file is left behind.
    """
    path = Path(path)
    partial = path.with_name(f".flux-{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: str | Path, error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError(f"Cannot write {path} ({reason}): make room or name another folder")
