"""The work of the Generate tab: images from a prompt."""

from collections.abc import Iterator, Mapping

from PIL import Image

from flux.conditions.images import ConditionImages, read_conditions
from flux.images.given import Images
from flux.images.io import crop_to_fit
from flux.settings.resolved import ResolvedGenerate
from flux.studio.engine import Engine, MadeImage, Progress, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio


def make_images(
    engine: Engine,
    settings: ResolvedGenerate,
    progress: Progress[MadeImage],
    image: Image.Image | None = None,
    conditions: ConditionImages | None = None,
) -> None:
    """Makes and emits the images one by one, as demo 0 does.

    Args:
        engine: The loaded model.
        settings: The prompts, and how to sample.
        progress: Receives steps and images.
        image: Start from this image instead of from noise alone.
        conditions: Images that steer the run.

    Raises:
        InputError: The content filter objects to an image.
    """
    pipe, steps, strength = engine.pipe, settings.num_steps, 1.0
    if conditions:
        for given in _images(conditions):
            engine.check(given)
        pipe = pipe.steered(conditions, settings)
    if image is not None:
        engine.check(image)
        image, strength = crop_to_fit(image, settings.width, settings.height), settings.strength
        steps -= round((1 - strength) * steps)
    progress.begin("drawing", steps * len(settings.prompts), settings.width, settings.height)
    for number, entry in enumerate(settings.prompts):
        [made] = pipe.generate(
            [entry.prompt],
            [entry.seed],
            image=image,
            strength=strength,
            on_step=progress.step,
            progress=False,
            **settings.sampling(),
        )
        progress.emit(MadeImage(f"{number:03d}", engine.check(made), entry.prompt, entry.seed))


def _images(conditions: ConditionImages) -> list[Image.Image]:
    alone = (conditions.control, conditions.filled and conditions.filled[0])
    return [*conditions.context, *conditions.redux, *filter(None, alone)]


def steering_images(settings: ResolvedGenerate, given: Mapping[str, Image.Image]) -> dict[str, Images]:
    """Brings a control image to the size of a run, and makes a list of a Redux image."""
    images: dict[str, Images] = {}
    if "control" in given:
        images["control"] = crop_to_fit(given["control"], settings.width, settings.height)
    if "redux" in given:
        images["redux"] = [given["redux"]]
    return images


def run_generate(
    studio: Studio,
    session: Session,
    settings: ResolvedGenerate,
    image: Image.Image | None = None,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[tuple[Update[MadeImage], Run]]:
    """Makes the images, and yields each update with its run.

    Args:
        studio: The studio.
        session: The visitor's session.
        settings: The prompts, and how to sample.
        image: Start from this image instead of from noise alone.
        steering: Images that steer the run, by the fields that name them.

    Raises:
        InputError: The images do not go together, or the content filter objects to one.
    """
    inputs: dict[str, Images] = {"image": image} if image else {}
    conditions = read_conditions(settings, steering)

    def work(progress: Progress[MadeImage], _: Run) -> None:
        make_images(studio.engine, settings, progress, image, conditions)

    return studio.run(session, settings, work, {**inputs, **(steering or {})})
