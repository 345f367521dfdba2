"""The work of the Generate tab: images from a prompt."""

from collections.abc import Iterator, Mapping

from PIL import Image

from flux.conditions.images import ConditionImages, read_conditions
from flux.images.given import Images
from flux.images.io import crop_to_fit
from flux.images.sizes import TOKEN
from flux.loaded_model import LoadedModel
from flux.settings.resolved import ResolvedGenerate, ResolvedModel, SteeredSettings
from flux.studio.engine import Engine
from flux.studio.progress import MadeImage, Progress, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio


def make_images(
    engine: Engine,
    settings: ResolvedGenerate,
    progress: Progress[MadeImage],
    image: Image.Image | None = None,
    conditions: ConditionImages | None = None,
) -> None:
    """Make and emit the images one by one, as demo 0 does.

    Args:
        engine: The loaded model.
        settings: The prompts, and how to sample.
        progress: Receives steps and images.
        image: Start from this image instead of from noise alone.
        conditions: Images that steer the run.

    Raises:
        InputError: The content filter objects to an image.
    """
    pipe, steps, strength = steered(engine, settings, conditions), settings.num_steps, 1.0
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


def steered(engine: Engine, settings: SteeredSettings, conditions: ConditionImages | None) -> LoadedModel:
    """Return the engine's model, steered by images if there are any.

    Raises:
        InputError: The content filter objects to an image.
    """
    if not conditions:
        return engine.pipe
    for image in images_of(conditions):
        engine.check(image)
    return engine.pipe.steered(conditions, settings)


def images_of(conditions: ConditionImages) -> list[Image.Image]:
    """List the images that steer a run, without their mask."""
    alone = (conditions.control, conditions.filled and conditions.filled[0])
    return [*conditions.context, *conditions.redux, *filter(None, alone)]


def steering_images(settings: ResolvedModel, given: Mapping[str, Image.Image]) -> dict[str, Images]:
    """Bring images that steer a run to its size, and make a list of a Redux image.

    Args:
        settings: The run.
        given: The images by the fields of the settings that name them. A mask has any size.
    """
    images: dict[str, Images] = {}
    size = settings.width, settings.height
    if "control" in given:
        images["control"] = crop_to_fit(given["control"], *size)
    if "fill" in given:
        image = given["fill"]
        mask = given["mask"].resize(image.size, Image.Resampling.NEAREST)
        images |= {"fill": fitted(image, size), "mask": fitted(mask, size)}
    if "redux" in given:
        images["redux"] = [given["redux"]]
    return images


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bring an image to a size. Where less than a token is too much, it is cut off and no pixel changes."""
    across, down = (own - wanted for own, wanted in zip(image.size, size))
    if 0 <= across < TOKEN and 0 <= down < TOKEN:
        left, above = across // 2, down // 2
        return image.crop((left, above, left + size[0], above + size[1]))
    return crop_to_fit(image, *size)


def run_generate(
    studio: Studio,
    session: Session,
    settings: ResolvedGenerate,
    image: Image.Image | None = None,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[tuple[Update[MadeImage], Run]]:
    """Make the images, and yield each update with its run.

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
