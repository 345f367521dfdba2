"""Describes a folder of images.

Each image's .txt file is written as soon as it is described, so a stopped run resumes with the next image.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from flux.captions.captioner import Captioner, Description
from flux.captions.folder import WRITTEN, ImageFolder, mentions
from flux.captions.tokens import TokenCounter
from flux.errors import InputError
from flux.files import claim_folder
from flux.images.io import read_image, thumbnail
from flux.runtime.devices import pick_device
from flux.settings.captions import CaptionSettings

TRIES = 3
"""The images after which a captioner that has failed for each of them is given up."""


@dataclass
class CaptionReport:
    """The numbers of a run.

    Attributes:
        file: The file captions.jsonl.
        texts: The texts by image, those that were there before included.
        new: The images that were described.
        cut: Those of them whose description the limit of tokens cut off.
        errors: A line for each image that could not be described, by image.
        tokens: A line for each text encoder about the texts' lengths.
    """

    file: Path
    texts: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)


def caption_folder(
    settings: CaptionSettings, captioner: Captioner | None = None, progress: bool = True
) -> CaptionReport:
    """Describe the images of a folder that have no text, and write captions.jsonl.

    Args:
        settings: The settings of the run.
        captioner: The loaded captioner. If None, it is loaded as soon as there is an image to describe.
        progress: Whether to show a progress bar.

    Returns:
        The report. An image that cannot be read or described is among its errors.

    Raises:
        InputError: There are no images, the folder cannot be written, or the captioner cannot be loaded or
            describes none of the first `TRIES` images.
    """
    folder = ImageFolder.open(settings.images)
    claim_folder(folder.path)
    run = _Run(folder, settings)
    todo = run.sort_out()
    counter = _counter(settings)
    if todo and captioner is None:
        captioner = Captioner.load(
            settings.caption_model, str(pick_device(settings.device)), settings.caption_prompt
        )
    try:
        with tqdm(total=len(todo), desc="caption", unit="image", disable=not progress) as bar:
            for start in range(0, len(todo), settings.batch_size):
                part = todo[start : start + settings.batch_size]
                if captioner is not None:
                    run.describe(captioner, part)
                bar.update(len(part))
    finally:  # also after Ctrl-C
        run.write_all()
    if counter and run.report.texts:
        run.report.tokens = counter.report(run.report.texts)
    return run.report


class _Run:
    """One run over a folder.

    Attributes:
        report: The numbers so far.
        failures: How often the captioner has failed for a single image.
    """

    def __init__(self, folder: ImageFolder, settings: CaptionSettings):
        self.folder, self.settings = folder, settings
        self.report, self.failures = CaptionReport(folder.path / WRITTEN), 0

    def sort_out(self) -> list[str]:
        """Read the texts that there are, and return the images that are to be described."""
        todo = []
        for image in self.folder.images:
            try:
                if other := self.folder.sharing(image):
                    raise InputError(f"Got {image} beside {other}, with one .txt file for both: rename one")
                text = self.folder.text(image)
            except InputError as error:
                self._fail(image, error)
                continue
            if text is not None:
                self.report.texts[image] = text
            if text is None or self.settings.recaption:
                todo.append(image)
        return todo

    def describe(self, captioner: Captioner, names: Sequence[str]) -> None:
        """Describe images in one batch, or one by one if that fails, and write their texts.

        Raises:
            InputError: A text cannot be written, or nothing could be described so far.
        """
        read = {name: self._read(name) for name in names}
        images = {name: image for name, image in read.items() if image}
        for name, found in self._described(captioner, images).items() if images else ():
            if not found.text:
                self._fail(name, InputError("Got no words: try another caption_prompt, or write the text"))
                continue
            text = compose(found.text, self.settings.prefix, self.settings.trigger)
            self.folder.write(name, text)
            self.report.texts[name] = text
            self.report.new.append(name)
            if not found.whole:
                self.report.cut.append(name)

    def write_all(self) -> None:
        """Write captions.jsonl, in the order of the images."""
        texts = self.report.texts
        self.folder.write_all({name: texts[name] for name in self.folder.images if name in texts})

    def _read(self, name: str) -> Image.Image | None:
        try:
            return thumbnail(read_image(self.folder.path / name), self.settings.max_side)
        except InputError as error:
            self._fail(name, error)
            return None

    def _described(self, captioner: Captioner, images: dict[str, Image.Image]) -> dict[str, Description]:
        ask = self.settings.caption_prompt, self.settings.max_new_tokens
        try:
            return dict(zip(images, captioner.describe(list(images.values()), *ask)))
        except InputError as error:
            if len(images) == 1:
                self._fail(next(iter(images)), error)
                self.failures += 1
                if self.failures >= TRIES and not self.report.new:
                    raise
                return {}
        # One of them may be at fault, or the batch too large.
        found: dict[str, Description] = {}
        for name, image in images.items():
            found |= self._described(captioner, {name: image})
        return found

    def _fail(self, image: str, error: InputError) -> None:
        self.report.errors[image] = str(error)
        tqdm.write(f"{image}: {error}", file=sys.stderr)


def compose(description: str, prefix: str = "", trigger: str = "") -> str:
    """Put together an image's text.

    Args:
        description: The captioner's words.
        prefix: Text before it.
        trigger: The word that the whole begins with, unless it is in it already.
    """
    text = f"{prefix.strip()} {description}".strip()
    word = trigger.strip()
    return text if not word or mentions(text, word) else f"{word}, {text}"


def _counter(settings: CaptionSettings) -> TokenCounter | None:
    """Return the counter of tokens. Without tokenizers on this machine and the hub, say so instead."""
    try:
        return TokenCounter.load(settings.text_encoders)
    except InputError as error:
        if settings.text_encoders:
            raise
        print(f"the texts' tokens are not counted: {error}", file=sys.stderr)
        return None
