"""The work of the LoRA tab's training: a LoRA that is learnt from a visitor's images.

It trains on weights of its own, so that the model of all visitors stays as it is. Only small models are
loaded a second time: those that are part of the package.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.errors import InputError
from flux.images.io import save_image, thumbnail
from flux.lora.train import TrainProgress, train
from flux.settings.train import TrainSettings
from flux.studio.hardening import TRAINING_IMAGES
from flux.studio.progress import Progress, Update
from flux.studio.sessions import Session
from flux.studio.state import Studio
from flux.studio.work.lora import HeldLora, hold_lora


@dataclass(frozen=True)
class Sample:
    """A sample of a training, and the number of the step after which it was made."""

    path: Path
    step: int


def can_train(studio: Studio) -> bool:
    """Tell whether the page offers trainings: of a small model that needs no image and many steps."""
    return studio.spec.folder is not None and studio.spec.shifted and studio.spec.condition is None


def keep_images(studio: Studio, session: Session, uploads: Any, inside: Path) -> list[Path]:
    """Check uploaded training images and keep them as bare pixels, in place of earlier ones.

    Args:
        studio: The studio.
        session: The visitor's session.
        uploads: What a browser or a program sent: a list of `{"path": ...}` if it is valid.
        inside: The folder that uploads are written to.

    Returns:
        The kept images, all in one folder.

    Raises:
        InputError: There are too many, or as `Limits.read_upload`.
    """
    if not isinstance(uploads, list) or not 1 <= len(uploads) <= TRAINING_IMAGES:
        raise InputError(f"Got no images, or too many: drop 1 to {TRAINING_IMAGES}")
    images = [thumbnail(studio.limits.read_upload(each, inside), studio.limits.side) for each in uploads]
    folder = session.folder / "uploads" / "training"
    shutil.rmtree(folder, ignore_errors=True)
    kept = [folder / f"{number:02}.png" for number in range(len(images))]
    for path, image in zip(kept, images):
        save_image(image, path)
    return kept


def run_training(
    studio: Studio, session: Session, settings: TrainSettings
) -> Iterator[Update[Sample | HeldLora]]:
    """Train a LoRA, and yield each update, at last one with the LoRA, which the session then holds."""
    if not can_train(studio):
        raise InputError("Got a training for a large model: use python -m flux.lora train")
    if not studio.disk.has_room():
        raise InputError("The studio's disk quota is used up: try again tomorrow")
    folder = session.folder / "training"
    shutil.rmtree(folder, ignore_errors=True)
    settings = settings.model_copy(update={"output_dir": str(folder)})

    def work(progress: Progress[Sample | HeldLora]) -> None:
        progress.begin("preparing", 0)

        def report(trained: TrainProgress) -> None:
            if trained.step == 1:  # not before: what was loaded says nothing of the steps' time
                progress.begin("training", settings.steps)
            for path in trained.samples:
                studio.engine.check_file(path)
                progress.emit(Sample(path, trained.step))
            progress.advance()

        path = train(settings, report)
        named = path.with_name("trained.safetensors")
        path.rename(named)
        progress.emit(hold_lora(studio, session, named))

    return studio.engine.run(work, session.stop)
