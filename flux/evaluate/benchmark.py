"""Reads and writes edit benchmarks in PIE-Bench's layout (Ju et al. 2023, arXiv 2310.01506).

A benchmark is a set of photographs with a prompt before and after the edit, and a mask of what may change:

    FOLDER/mapping_file.json             the edits, by their key
    FOLDER/annotation_images/...         the images

`training.benchmark` writes the same layout for flux-nano. Its entries have four more fields: `kind`, the
`seed` of the noise, the finished edit (`target_image_path`, also under annotation_images) and what a judge
checks (`asked`).
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
from flux.images.io import image_size, read_image
from flux.images.sizes import TOKEN
from flux.settings.messages import show

MAPPING, IMAGES = "mapping_file.json", "annotation_images"
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

# Texts of an entry. The first three must be there.
NEEDED = ("image_path", "original_prompt", "editing_prompt")
TEXTS = (*NEEDED, "target_image_path", "kind", "editing_instruction")


@dataclass(frozen=True)
class Item:
    """One edit of a benchmark.

    Attributes:
        key: The edit's key in the benchmark's file.
        path: The file of the photograph.
        source: The prompt that describes the photograph.
        target: The prompt that describes the edit.
        kind: The kind of edit.
        runs: The mask of what may change, see `decode_mask`.
        seed: The seed of the noise, for methods that draw any.
        truth: The file of the finished edit, if the benchmark has it.
        asked: What a judge checks in the edit, if the benchmark says so.
        instruction: The edit said as an instruction. Empty if the benchmark has none.
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
    instruction: str = ""

    def prompt(self, by_instruction: bool = False, reconstruct: bool = False) -> str:
        """Return the prompt of the edit.

        Args:
            by_instruction: Whether it is an instruction, for a model that sees the photograph.
            reconstruct: Whether the edit is to show what the photograph does.
        """
        if by_instruction:
            return self.instruction
        return self.source if reconstruct else self.target

    def photo(self, width: int, height: int) -> Image.Image:
        """Crop and scale the photograph to `width` x `height` pixels. Raise InputError as `read_image`."""
        return Photograph.of(read_image(self.path), width, height).part

    def mask(self, width: int, height: int, guarded: bool = True) -> Image.Image:
        """Cut the mask like the photograph: an image of mode "1", white where pixels may change.

        Args:
            width: The width of the photograph's part in pixels.
            height: Its height in pixels.
            guarded: See `decode_mask`.
        """
        mask = Image.fromarray(decode_mask(self.runs, *read_image(self.path).size, guarded))
        return mask.resize((width, height), Image.Resampling.NEAREST, middle(mask.size, width, height))


def decode_mask(runs: Sequence[int], width: int, height: int, guarded: bool = True) -> np.ndarray:
    """Decode a run-length coded mask to booleans `height width`.

    Pixels are numbered row by row. Runs beyond the last pixel are cut off.

    Args:
        runs: Start and length of each run of true pixels, in turn.
        width: The width in pixels.
        height: The height in pixels.
        guarded: Whether the outermost pixels are true, as in the benchmark's own evaluation, which calls it a
            guard against inexact annotation.
    """
    mask = np.zeros(height * width, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2]):
        mask[start : start + length] = True
    mask = mask.reshape(height, width)
    if guarded:
        mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def encode_mask(mask: np.ndarray) -> list[int]:
    """Encode a mask of booleans `H W` as runs. `decode_mask` restores all but the outermost pixels."""
    edges = np.diff(mask.reshape(-1).astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return np.stack((starts, ends - starts), axis=1).reshape(-1).tolist()


def read_benchmark(folder: str | Path) -> list[Item]:
    """Read the edits of a benchmark's folder, in the order of its file.

    Raises:
        InputError: The folder holds no benchmark, an entry lacks a field, or an image is missing, unreadable
            or tiny.
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
    return [_read_item(Path(folder), str(key), entry) for key, entry in entries.items()]


def _read_item(folder: Path, key: str, entry: Any) -> Item:
    where = f"Got the edit {key!r} of {folder / MAPPING}"
    if not isinstance(entry, dict):
        raise InputError(f"{where}, which is no object")
    for name in TEXTS:
        value = entry.get(name) or ""
        is_text = isinstance(value, str) and bool(_without_brackets(value).strip())
        if not is_text and (value or name in NEEDED):
            raise InputError(f"{where}, which has no text {name!r}")
    runs, seed, asked = entry.get("mask"), entry.get("seed", 0), entry.get("asked")
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(n) is int and n >= 0 for n in runs):
        raise InputError(f"{where}, whose mask is no list of starts and lengths")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise InputError(f"{where}: expected seed to be an integer of at least 0, got {show(seed)}")
    if not isinstance(asked, dict | None):
        raise InputError(f"{where}: expected asked to be an object, got {show(asked)}")
    # The key names the files of results, so it must not lead out of their folder.
    if not key.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"{where}: expected its name to be made of letters, digits, - and _")
    names = entry["image_path"], entry.get("target_image_path")
    paths = [folder / IMAGES / name for name in names if name]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{where}, whose image {path} is not there")
        if min(image_size(path)) < TOKEN:
            raise InputError(f"{where}, whose image {path} has a side of less than {TOKEN} pixels")
    return Item(
        key=key,
        path=paths[0],
        source=_without_brackets(entry["original_prompt"]),
        target=_without_brackets(entry["editing_prompt"]),
        kind=entry.get("kind") or KINDS.get(str(entry.get("editing_type_id")), "random"),
        runs=tuple(runs),
        seed=seed,
        truth=paths[1] if len(paths) > 1 else None,
        asked=asked,
        instruction=entry.get("editing_instruction") or "",
    )


def _without_brackets(prompt: str) -> str:
    """Remove the brackets that mark the words in which the two prompts differ."""
    return prompt.replace("[", "").replace("]", "")


def select_kinds(items: Sequence[Item], kinds: Sequence[str]) -> list[Item]:
    """Select the items of the named kinds, or all items if `kinds` is empty.

    Raises:
        InputError: No item is of one of the kinds.
    """
    known = dict.fromkeys(item.kind for item in items)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise InputError(f"Got the kinds {', '.join(unknown)}, but the benchmark has {', '.join(known)}")
    return [item for item in items if not kinds or item.kind in kinds]


def select_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Select `count` items with the kinds in their original proportions, or all items if there are fewer.

    A smaller selection is a part of a larger one.
    """
    if count is None or count >= len(items):
        return list(items)
    kinds = list(dict.fromkeys(item.kind for item in items))
    by_kind = [[item for item in items if item.kind == kind] for kind in kinds]
    # Each item's place within its own kind, in 0..1: the lowest are an even choice.
    places = {item.key: (n + 0.5) / len(group) for group in by_kind for n, item in enumerate(group)}
    chosen = {item.key for item in sorted(items, key=lambda item: places[item.key])[:count]}
    return [item for item in items if item.key in chosen]


def benchmark_fingerprint(folder: str | Path) -> str:
    """Hash the benchmark's file, so that another set of edits is noticed."""
    return hashlib.sha256((Path(folder) / MAPPING).read_bytes()).hexdigest()[:16]


def write_benchmark(folder: str | Path, entries: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Write the file that `read_benchmark` reads. The caller writes the images."""
    write_json(Path(folder) / MAPPING, dict(entries))
