"""The training images: their captions, the sizes they are trained at, and the order they come in."""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flux.captions.folder import ImageFolder, mentions
from flux.errors import InputError
from flux.images.io import read_image
from flux.settings.train import TRIGGER, TrainSettings
from flux.specs import ModelSpec

STEP = 64  # pixels; images whose sides differ by less share a bucket
LARGE_SIZES = (512, 768, 1024)


@dataclass(frozen=True)
class Example:
    """A training image at one size.

    Attributes:
        path: The file.
        caption: Its caption, with the trigger.
        width: The width in pixels that it is scaled and cropped to, a multiple of `STEP`.
        height: The height.
    """

    path: Path
    caption: str
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height


@dataclass(frozen=True)
class TrainingSet:
    """All examples.

    Attributes:
        examples: Every image at every size.
        fingerprint: Identifies their pixels and captions.
    """

    examples: tuple[Example, ...]
    fingerprint: str

    @cached_property
    def images(self) -> list[Path]:
        """The image files, each once."""
        return list(dict.fromkeys(example.path for example in self.examples))

    @cached_property
    def captions(self) -> list[str]:
        """The captions, each once."""
        return list(dict.fromkeys(example.caption for example in self.examples))

    @cached_property
    def largest(self) -> Example:
        """The example with the most pixels."""
        return max(self.examples, key=lambda example: example.width * example.height)

    def batches(self, seed: int, epoch: int, batch_size: int) -> list[list[int]]:
        """Divide the examples into batches of one size each, anew in each epoch.

        The number of batches is the same in all epochs. The last batch of a size may be smaller.

        Args:
            seed: Seed of the training.
            epoch: How often all examples have been seen.
            batch_size: Examples in a batch.

        Returns:
            The numbers of the examples in each batch.
        """
        order = random.Random(f"{seed} {epoch}")
        of_size: dict[tuple[int, int], list[int]] = {}
        for number in order.sample(range(len(self.examples)), len(self.examples)):
            of_size.setdefault(self.examples[number].size, []).append(number)
        batches = [
            numbers[start : start + batch_size]
            for numbers in of_size.values()
            for start in range(0, len(numbers), batch_size)
        ]
        order.shuffle(batches)
        return batches


def read_training_set(settings: TrainSettings, spec: ModelSpec) -> TrainingSet:
    """Read the folder of training images, and check every image and caption.

    Raises:
        InputError: The folder cannot be read, an image is damaged or too small, or a caption is missing or
            no UTF-8. The message names the file.
    """
    folder = ImageFolder.open(settings.images)
    sizes, examples, digest = settings.sizes or usual_sizes(spec), [], hashlib.sha256()
    for name in folder.images:
        path, caption = folder.path / name, _caption(folder, name, settings)
        image = read_image(path)
        if min(image.size) < STEP:
            raise InputError(
                f"Got {path} of {image.width}x{image.height} pixels: expected at least {STEP} on each side"
            )
        found = list(dict.fromkeys(bucket(image.width, image.height, size) for size in sizes))
        examples += [Example(path, caption, *each) for each in found]
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        digest.update(json.dumps([name, pixels, image.size, caption, found]).encode())
    return TrainingSet(tuple(examples), digest.hexdigest()[:32])


def usual_sizes(spec: ModelSpec) -> Sequence[int]:
    """The sizes that a model is trained at by default."""
    return LARGE_SIZES if spec.size >= max(LARGE_SIZES) else (spec.size,)


def bucket(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the size that an image is trained at: about size x size pixels, in its own proportions.

    Sides are rounded down to multiples of `STEP`, and are at least that. Images are never enlarged.
    """
    scale = min(1.0, size / math.sqrt(width * height))
    # A side that is a multiple already must not fall below it by rounding.
    wide, high = (math.floor(side * scale + 1e-6) // STEP * STEP for side in (width, height))
    return max(wide, STEP), max(high, STEP)


def _caption(folder: ImageFolder, name: str, settings: TrainSettings) -> str:
    """An image's caption, with the trigger in its place or in front."""
    text, trigger = folder.text(name) or "", settings.trigger
    if not text and trigger is None:
        raise InputError(
            f"Got {folder.path / name}, which has no caption: write {folder.text_file(name).name} beside it, "
            "or give a trigger, which then stands alone"
        )
    if trigger is None:
        if TRIGGER in text:
            raise InputError(
                f"Got {TRIGGER} in the caption of {folder.path / name}, but no trigger: give one"
            )
        return text
    if TRIGGER in text or mentions(text, trigger):
        return settings.with_trigger(text)
    return f"{trigger}, {text}" if text else trigger
