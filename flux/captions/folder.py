"""A folder of images and their texts.

| file | what it holds |
|---|---|
| `photo.jpg`, `photo.txt` | an image and its text |
| `captions.jsonl` | all texts, a line `{"file_name": ..., "text": ...}` each, written by this package |
| `metadata.jsonl` | texts of another program in the same form |
"""

import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flux.errors import InputError, warn
from flux.files import write_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
UNREAD = (".avif", ".gif", ".heic", ".heif", ".jxl")
"""Kinds of images that are not read."""
GIVEN, WRITTEN = "metadata.jsonl", "captions.jsonl"


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images.

    An image's text is in the .txt file of its name, else in captions.jsonl, else in metadata.jsonl.

    Attributes:
        path: The folder.
        images: The names of its image files, sorted.
        given: The texts of captions.jsonl and metadata.jsonl by the image's name.
    """

    path: Path
    images: tuple[str, ...]
    given: dict[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> "ImageFolder":
        """List a folder's images, without those of its subfolders.

        Raises:
            InputError: It is no folder that can be read, holds no images, or a .jsonl file in it is broken.
        """
        path = Path(folder)
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise InputError(f"Got images {path}, which {what}: give a folder of images")
        try:
            names = sorted(os.listdir(path))
        except OSError as error:
            raise InputError(f"Got images {path}, which cannot be read: {error.strerror}") from error
        images = tuple(name for name in names if _is_image(path / name))
        if not images:
            raise InputError(f"Got images {path}, which holds no image: expected {', '.join(SUFFIXES)}")
        if unread := [name for name in names if Path(name).suffix.lower() in UNREAD]:
            some = ", ".join(unread[:3]) + " ..." * (len(unread) > 3)
            warn(f"Got {some} in {path}, of kinds that are not read: save them as PNG or JPEG")
        given: dict[str, str] = {}
        for name in (GIVEN, WRITTEN):
            given |= _read_lines(path / name) if name in names else {}
        return cls(path, images, given)

    def text_file(self, image: str) -> Path:
        """Return the path of an image's .txt file."""
        return (self.path / image).with_suffix(".txt")

    @cached_property
    def _first_of_stem(self) -> dict[str, str]:
        return {Path(name).stem: name for name in reversed(self.images)}

    def sharing(self, image: str) -> str | None:
        """Return the first image whose .txt file would be this one's too, if it is another one."""
        first = self._first_of_stem[Path(image).stem]
        return None if first == image else first

    def text(self, image: str) -> str | None:
        """Return an image's text. None if there is none, or nothing but blanks.

        Raises:
            InputError: The .txt file cannot be read as UTF-8.
        """
        file = self.text_file(image)
        if not file.exists():
            return self.given.get(image, "").strip() or None
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        except OSError as error:
            raise InputError(f"Got {file}, which cannot be read: {error.strerror}") from error
        if "\0" in text:  # a file that was cut short by a crash is often full of them
            raise InputError(f"Got {file}, which is not UTF-8 text: save it as UTF-8, or delete it")
        return text.strip() or None

    def write(self, image: str, text: str) -> None:
        """Write an image's .txt file. Raise InputError as `flux.files.write_bytes`."""
        write_text(self.text_file(image), text + "\n")

    def write_all(self, texts: dict[str, str]) -> Path:
        """Write captions.jsonl with the texts by image, and return its path."""
        lines = [{"file_name": name, "text": text} for name, text in texts.items()]
        path = self.path / WRITTEN
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return path


def mentions(text: str, trigger: str) -> bool:
    """Return whether a trigger is in a text: as a whole word, in capitals or not."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_lines(path: Path) -> dict[str, str]:
    """Return the texts of a file of lines {"file_name": ..., "text": ...}, by file name."""
    texts = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Got {path}, which cannot be read as UTF-8 text ({error}): mend it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields["file_name"], fields["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{path}: line {number}: expected {{"file_name": "a.png", "text": "..."}}, got {line[:60]}'
            ) from None
        texts[name] = text
    return texts
