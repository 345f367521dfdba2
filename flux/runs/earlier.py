"""Images that an earlier, longer run left in an output folder."""

import re
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from flux.errors import InputError, warn
from flux.images.io import read_metadata
from flux.settings.complete import WRITTEN
from flux.settings.resolved import ResolvedModel

WITHOUT_METADATA = {"steps.png", "steps.gif"}


def remove_earlier_images(settings: ResolvedModel, written: Collection[Path]) -> None:
    """Delete the images of an earlier run of the same demo that this run has not replaced.

    Then the folder holds one run, that of its run.json. An image is deleted if it has the name of one of the
    demo's, and its metadata say that the demo made it. Others stay, with a warning.

    Args:
        settings: The settings of this run.
        written: The images that it wrote.
    """
    folder, demo = Path(settings.output_dir), settings.demo
    old = [
        path
        for path in sorted((*folder.glob("*"), *folder.glob("prompt_*/*")))
        if re.fullmatch(WRITTEN[demo], path.relative_to(folder).as_posix()) and path not in written
    ]
    made = [path for path in old if _is_made_by(demo, path)]
    places = {path.parent for path in made}
    for path in old:
        if path in made or (path.name in WITHOUT_METADATA and path.parent in places):
            with suppress(OSError):  # such as an image that Windows shows
                path.unlink()
    for place in places - {folder}:
        with suppress(OSError):  # it holds something else
            place.rmdir()
    if removed := [path for path in old if not path.exists()]:
        print(f"removed from {folder} what an earlier run left: {_names(removed, folder)}", file=sys.stderr)
    if others := [path for path in old if path.exists()]:
        warn(f"{folder} also holds {_names(others, folder)}, which this run did not make")


def _is_made_by(demo: str, path: Path) -> bool:
    """Return whether the metadata of an image say that this demo made it."""
    try:
        metadata = read_metadata(path)
    except InputError:  # no image
        return False
    return metadata is not None and metadata.get("demo") == demo


def _names(paths: Sequence[Path], folder: Path) -> str:
    """Name the files by their paths in a folder: a few, or the first and the last of many."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} images)"
