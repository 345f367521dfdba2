"""Images that an earlier, longer run left in an output folder."""

import re
from collections.abc import Collection
from pathlib import Path

from flux.errors import warn
from flux.settings.complete import WRITTEN
from flux.settings.resolved import ResolvedModel


def warn_of_earlier_images(settings: ResolvedModel, written: Collection[Path]) -> None:
    """Warn of images in the output folder that an earlier run left there. They are not those of run.json.

    Args:
        settings: The settings of this run.
        written: The images that it wrote.
    """
    folder = Path(settings.output_dir)
    found = (path for path in (*folder.glob("*"), *folder.glob("prompt_*/*")) if path not in written)
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    names = [name for name in names if re.fullmatch(WRITTEN[settings.demo], name)]
    if names:
        listed = ", ".join(names) if len(names) <= 3 else f"{names[0]} to {names[-1]} ({len(names)} images)"
        warn(f"{folder} also holds {listed} of an earlier run: name another output_dir to keep runs apart")
