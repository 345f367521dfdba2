"""The training images: their captions, the sizes they are trained at, and the order they come in.

Kontext learns from pairs. An image `name.png`, made as the instruction in `name.txt` says, has in the
subfolder `context` the image of that name that it was made of.
"""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

from flux.captions.folder import ImageFolder, mentions
from flux.conditions.kontext import kontext_size
from flux.errors import InputError, warn
from flux.images.io import read_image
from flux.settings.train import TRIGGER, TrainSettings
from flux.specs import ModelSpec

STEP = 64  # pixels; images whose sides differ by less share a bucket
LARGE_SIZES = (512, 768, 1024)
CONTEXT = "context"
"""The subfolder of the images that Kontext is given."""


@dataclass(frozen=True)
class Example:
    """A training image at one size.

    Attributes:
        path: The file.
        caption: Its caption, with the trigger.
        width: The width in pixels that it is scaled and cropped to, a multiple of `STEP`.
        height: The height.
        context: The file of the image that Kontext is given. If None, the example is no pair.
    """

    path: Path
    caption: str
    width: int
    height: int
    context: Path | None = None

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

    def pair_of(self, prompt: str, number: int) -> int:
        """The number of the example whose context image a sample gets, at the largest of its sizes.

        Args:
            prompt: The prompt of the sample. If it is a caption, one of the images that have it is taken.
            number: The number of the sample. It chooses among these images, or else among all.
        """
        with_caption = dict.fromkeys(each.path for each in self.examples if each.caption == prompt)
        paths = list(with_caption) or self.images
        path = paths[number % len(paths)]
        own = [index for index, each in enumerate(self.examples) if each.path == path]
        return max(own, key=lambda index: self.examples[index].width * self.examples[index].height)

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
        InputError: The folder cannot be read, an image is damaged or too small, or a caption is missing or no
            UTF-8. For Kontext, a pair lacks an image. The message names the file.
    """
    folder = ImageFolder.open(settings.images)
    contexts = _find_contexts(folder, settings.model) if spec.condition == "kontext" else {}
    if not contexts and (folder.path / CONTEXT).is_dir():
        warn(f"{folder.path / CONTEXT} is not used: {settings.model} is trained on images alone")
    sizes, examples, digest = settings.sizes or usual_sizes(spec), [], hashlib.sha256()
    for name in folder.images:
        path, caption = folder.path / name, _caption(folder, name, settings)
        image, context = _read(path), contexts.get(name)
        content, size_for = [name, _digest(image), image.size, caption], bucket
        if context:
            before = _read(context)
            _check_shapes(path, image, context, before)
            content += [_digest(before), before.size]
            size_for = pair_size
        found = list(dict.fromkeys(size_for(image.width, image.height, size) for size in sizes))
        examples += [Example(path, caption, *each, context) for each in found]
        digest.update(json.dumps([*content, found]).encode())
    if bare := [name for name in folder.images if not folder.text(name)]:
        count = f"{len(bare)} of {len(folder.images)}"
        warn(f"{count} images have no caption, such as {bare[0]}: the trigger stands alone")
    most = max(Counter(example.size for example in examples).values())
    if (given := settings.batch_size) > most:
        warn(f"Got batch_size {given}, but at most {most} images of one size, as each batch has them")
    return TrainingSet(tuple(examples), digest.hexdigest()[:32])


def _read(path: Path) -> Image.Image:
    """Read a training image. Raises InputError if it is damaged or too small."""
    image = read_image(path)
    if min(image.size) < STEP:
        raise InputError(
            f"Got {path} of {image.width}x{image.height} pixels: expected at least {STEP} on each side"
        )
    return image


def _digest(image: Image.Image) -> str:
    """The SHA-256 of an image's pixels."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def _find_contexts(folder: ImageFolder, model: str) -> dict[str, Path]:
    """Find the context image of each image of a folder, by its name.

    Raises:
        InputError: An image has none or two, or there is one without an image.
    """
    place = folder.path / CONTEXT
    if not place.is_dir():
        raise InputError(
            f"Got images {folder.path} without a folder {CONTEXT}, but {model} is trained on pairs: put the "
            f"image that each one was made of into {place}, under the same name"
        )
    found: dict[str, list[Path]] = {}
    for name in ImageFolder.open(place).images:
        found.setdefault(Path(name).stem, []).append(place / name)
    contexts = {}
    for name in folder.images:
        paths = found.get(Path(name).stem, [])
        if len(paths) != 1:
            raise InputError(
                f"Got {folder.path / name} with {len(paths)} images of that name in {place}: expected one, "
                "the image that it was made of"
            )
        contexts[name] = paths[0]
    if alone := found.keys() - {Path(name).stem for name in folder.images}:
        path = found[min(alone)][0]
        raise InputError(f"Got {path}, but no image of that name in {folder.path}: add what is made of it")
    return contexts


def _check_shapes(path: Path, image: Image.Image, context: Path, before: Image.Image) -> None:
    """Raise InputError unless both images of a pair have one shape: their tokens share positions."""
    if kontext_size(*image.size) != kontext_size(*before.size):
        raise InputError(
            f"Got {path} of {image.width}x{image.height} and {context} of {before.width}x{before.height}: "
            "expected both in one shape"
        )


def usual_sizes(spec: ModelSpec) -> Sequence[int]:
    """The sizes that a model is trained at by default. Kontext makes images of one size."""
    several = spec.size >= max(LARGE_SIZES) and spec.condition is None
    return LARGE_SIZES if several else (spec.size,)


def pair_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the size that both images of a pair are trained at, see `kontext_size`.

    Args:
        width: Width of the image.
        height: Its height.
        size: Side of the square of as many pixels. Images are not enlarged beyond that.
    """
    return kontext_size(width, height, min(size, math.isqrt(width * height)))


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
