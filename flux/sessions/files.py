"""Numbered image files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flux.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def next_index(folder: Path) -> int:
    """Return one more than the highest number of the images img_N.jpg in a folder."""
    numbers = [
        int(match[1])
        for path in folder.glob("img_*.*")
        if (match := re.fullmatch(r"img_(\d+)\.\w+", path.name))
    ]
    return max(numbers, default=-1) + 1


def reserve_path(folder: Path) -> Path:
    """Create the next img_N.jpg, still empty, so that no other process takes the same number.

    Raises:
        InputError: The folder cannot be written to.
    """
    number = next_index(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = folder / f"img_{number}.jpg"
            try:
                path.touch(exist_ok=False)
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"Cannot write to {folder} ({error.strerror}): name another folder") from error


def save_sample(
    nsfw_classifier: Callable | None, name: str, output_name: str, idx: int, x: "Tensor",
    add_sampling_metadata: bool, prompt: str, track_usage: bool = False,
) -> int:  # fmt: skip
    """Watermark an image and save it, as upstream's `save_image` does.

    Args:
        nsfw_classifier: Called with the image, returns scores with "label" and "score". An image that it
            finds unsafe is not saved. If None, nothing is checked.
        name: Name of the model.
        output_name: Path with {idx} in it.
        idx: Number of the image.
        x: The image, "1 3 h w" in -1..1.
        add_sampling_metadata: Whether model and prompt are written into the file.
        prompt: The prompt.
        track_usage: Whether the image is reported to BFL.

    Returns:
        The next index: idx + 1 if the image was saved, else idx.
    """
    from flux.bfl import track_usage_via_api
    from flux.images.io import save_image, to_pil
    from flux.images.watermark import embed_watermark

    image = to_pil(embed_watermark(x.float().clamp(-1, 1))[0])
    if nsfw_classifier is not None:
        scores = {entry["label"]: entry["score"] for entry in nsfw_classifier(image)}
        if scores.get("nsfw", 0.0) >= 0.85:
            print("The image may be unsafe for work and was not saved")
            return idx
    path = Path(output_name.format(idx=idx))
    save_image(image, path, {"model": name, "prompt": prompt} if add_sampling_metadata else None)
    if track_usage:
        track_usage_via_api(name, 1)
    return idx + 1
