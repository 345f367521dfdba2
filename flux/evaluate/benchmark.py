"""PIE-Bench's layout (Ju et al. 2023, arXiv 2310.01506): photographs to edit, prompts before and after, and
masks of what may change.

    FOLDER/mapping_file.json             what is to be done with each picture, by its number
    FOLDER/annotation_images/...         the pictures

`training.benchmark` writes the same layout for flux-nano. It adds to an entry its `kind`, the `seed` of its
noise, the finished edit (`target_image_path`, also under annotation_images) and what a judge is to look for
(`asked`); PIE-Bench itself has none of these.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux.editing.photo import Photograph, middle
from flux.errors import InputError
from flux.files import write_json
from flux.images.io import read_image

MAPPING, PICTURES = "mapping_file.json", "annotation_images"
KINDS = {
    "0": "random",
    "1": "replace",
    "2": "add",
    "3": "remove",
    "4": "attribute",
    "5": "pose",
    "6": "colour",
    "7": "material",
    "8": "background",
    "9": "style",
}


@dataclass(frozen=True)
class Item:
    """One edit to be made.

    Attributes:
        key: its number in the benchmark.
        path: file of the photograph.
        source, target: what the photograph shows and what it is to show.
        kind: of the edit.
        runs: the mask of what may change, see `decode_mask`.
        seed: of the noise, where there is any.
        truth: file of the finished edit, if the benchmark knows it.
        asked: what a judge is to look for in the edit.
    """

    key: str
    path: Path
    source: str
    target: str
    kind: str
    runs: tuple[int, ...]
    seed: int = 0
    truth: Path | None = None
    asked: dict[str, Any] | None = None

    def photo(self, width: int, height: int) -> Image.Image:
        """The part of the photograph that is edited, in that size. Raises InputError as `read_image`."""
        return Photograph.of(read_image(self.path), width, height).part

    def mask(self, width: int, height: int) -> Image.Image:
        """What may change of that part, white on black (mode "1"), in the same size."""
        mask = Image.fromarray(decode_mask(self.runs, *read_image(self.path).size))
        return mask.resize((width, height), Image.Resampling.NEAREST, middle(mask.size, width, height))


def decode_mask(runs: Sequence[int], width: int, height: int) -> np.ndarray:
    """The mask as booleans "H W" from its runs of true pixels, a start and a length in turn, row after row.

    What lies beyond the picture is cut off, and the outermost pixels are true always, as in the benchmark's
    own evaluation, which calls it a guard against inexact annotation.
    """
    mask = np.zeros(height * width, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2]):
        mask[start : start + length] = True
    mask = mask.reshape(height, width)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def encode_mask(mask: np.ndarray) -> list[int]:
    """The runs of a mask "H W", of which `decode_mask` makes it again (but for the outermost pixels)."""
    edges = np.diff(mask.reshape(-1).astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return np.stack((starts, ends - starts), axis=1).reshape(-1).tolist()


def read_benchmark(folder: str | Path) -> list[Item]:
    """The edits of a benchmark's folder, in the order of its file.

    Raises:
        InputError: no benchmark there, an entry that lacks something, or a picture that is not there.
    """
    path = Path(folder) / MAPPING
    if not path.is_file():
        raise InputError(
            f"Got the benchmark {folder}, which holds no {MAPPING}: give the folder of PIE-Bench, or make "
            "flux-nano's with python -m training.benchmark"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"Got {path}, which cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"Got {path}, which holds no edits: expected an object with one entry for each")
    return [_item(Path(folder), str(key), entry) for key, entry in entries.items()]


def _item(folder: Path, key: str, entry: Any) -> Item:
    where = f"Got the edit {key!r} of {folder / MAPPING}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}, which is no object")
    for name in ("image_path", "original_prompt", "editing_prompt"):
        if not isinstance(entry.get(name), str):
            raise InputError(f"{where}, which has no text {name!r}")
    runs, kind = entry.get("mask"), KINDS.get(str(entry.get("editing_type_id")), "random")
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(n) is int and n >= 0 for n in runs):
        raise InputError(f"{where}, whose mask is no list of starts and lengths")
    # The number alone names the files of results, so it must not lead out of their folder.
    if not key.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"{where}: expected its name to be made of letters, digits, - and _")
    paths = [folder / PICTURES / entry[name] for name in ("image_path", "target_image_path") if name in entry]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{where}, whose picture {path} is not there")
    return Item(
        key,
        paths[0],
        _plain(entry["original_prompt"]),
        _plain(entry["editing_prompt"]),
        entry.get("kind", kind),
        tuple(runs),
        entry.get("seed", 0),
        paths[1] if len(paths) > 1 else None,
        entry.get("asked"),
    )


def _plain(prompt: str) -> str:
    """Without the brackets that mark the words that differ."""
    return prompt.replace("[", "").replace("]", "")


def of_kinds(items: Sequence[Item], kinds: Sequence[str]) -> list[Item]:
    """The items of these kinds, or all if none is named. Raises InputError for a kind that none is of."""
    there = dict.fromkeys(item.kind for item in items)
    if unknown := [kind for kind in kinds if kind not in there]:
        raise InputError(f"Got the kinds {', '.join(unknown)}, but the benchmark has {', '.join(there)}")
    return [item for item in items if not kinds or item.kind in kinds]


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """`count` of the items, of each kind about its share; all if there are fewer."""
    if count is None or count >= len(items):
        return list(items)
    kinds = list(dict.fromkeys(item.kind for item in items))
    by_kind = [[item for item in items if item.kind == kind] for kind in kinds]
    # Each item's place within its own kind, in 0..1: the lowest are an even choice.
    places = {item.key: (n + 0.5) / len(group) for group in by_kind for n, item in enumerate(group)}
    chosen = {item.key for item in sorted(items, key=lambda item: places[item.key])[:count]}
    return [item for item in items if item.key in chosen]


def fingerprint(folder: str | Path) -> str:
    """Of the benchmark's file: another one, another set of edits."""
    return hashlib.sha256((Path(folder) / MAPPING).read_bytes()).hexdigest()[:16]


def write_benchmark(folder: str | Path, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Writes the file that `read_benchmark` reads; the pictures are the caller's to write."""
    write_json(Path(folder) / MAPPING, dict(entries))
