"""Runs read back from their folders: after a reload, after a restart, and the example of the first minute.

An image file carries the mask that was painted for it, packed as a text.
"""

import re
from base64 import b64decode, b64encode
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from PIL import Image

import flux
from flux.errors import InputError
from flux.images.io import read_metadata
from flux.studio.sessions import Run, Session, Sessions, read_back

EXAMPLE = Path(flux.__file__).parent / "assets" / "example"
"""The folder of a run that is shown before there is another."""
GONE = "That image is gone: images are deleted a day after the visit's last use, the oldest of many earlier"
IMAGES = re.compile(r"(\d{3}|reference|edit_\d+|picture)\.(png|jpg)")
"""The files of a run's images, without its inputs, masks and sheets."""


def read_run(folder: Path) -> Run | None:
    """Read a run back from its folder, or return None if there is none."""
    try:
        settings, _ = read_back(folder / "run.json")
    except InputError:
        return None
    run = Run(folder, settings)
    files = [path for path in folder.iterdir() if IMAGES.fullmatch(path.name)]
    for path in sorted(files, key=lambda path: (path.stem != "reference", len(path.stem), path.stem)):
        about = read_metadata(path) or {}
        run.images[path.stem], run.captions[path.stem] = path, str(about.get("prompt", ""))
    return run


def shown_run(folder: str | Path) -> Run:
    """Read the run in a folder. Raise InputError if it has been deleted."""
    run = read_run(Path(folder))
    if run is None:
        raise InputError(GONE)
    return run


def read_runs(folder: Path) -> list[Run]:
    """Read all runs of a visit's folder, oldest first."""
    runs = (read_run(path) for path in sorted(folder.glob("*_*/")))
    return [run for run in runs if run is not None]


def continue_visit(sessions: Sessions, name: str | None, visit: str) -> Session:
    """Let a session go on with a browser's visit: with its folder, and the runs that are still there.

    Args:
        sessions: All sessions.
        name: The session's name.
        visit: The secret that the browser keeps. Anything else starts no visit.
    """
    session = sessions.of(name)
    if re.fullmatch("[0-9a-f]{32}", visit):
        # Addresses of images show the folder's name, from which nobody learns the secret.
        folder = sessions.folder / sha256(visit.encode()).hexdigest()[:32]
        known = sessions.with_folder(folder)
        session.folder, session.runs = folder, known.runs if known else read_runs(folder)
    return session


def existing_file(path: str | Path | None) -> Path:
    """Return the path of an image that is shown. Raise InputError if it has been deleted."""
    if path is None or not Path(path).is_file():
        raise InputError(GONE)
    return Path(path)


# ---- masks in image files


def pack_mask(mask: Image.Image) -> str:
    """Write a mask as a text: a PNG of one bit a pixel, in base64."""
    file = BytesIO()
    mask.convert("L").point([0] * 128 + [255] * 128).convert("1").save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def unpack_mask(text: str) -> Image.Image:
    """Read a mask that `pack_mask` wrote: white where an edit may change, mode "L".

    Raises:
        InputError: The text is no such mask. It may come from anybody's file.
    """
    try:
        with Image.open(BytesIO(b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or 0):
                raise ValueError("too large")
            return image.convert("L")
    except Exception:  # damage makes pillow raise OSError, SyntaxError, struct.error and more
        raise InputError("Got an image whose mask cannot be read: paint the mask again") from None
