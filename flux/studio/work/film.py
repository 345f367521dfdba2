"""The work of the film tab: the steps of an image, and what its layers attend to."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from flux.attention.film import Film
from flux.attention.watch import watch
from flux.conditions.images import ConditionImages, read_conditions
from flux.images.given import Images
from flux.images.io import save_image
from flux.runs.record import image_metadata
from flux.settings.resolved import ResolvedLayer
from flux.studio.engine import Engine
from flux.studio.progress import MadeImage, Progress, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.work.generate import steered


def make_film(
    engine: Engine,
    settings: ResolvedLayer,
    progress: Progress[MadeImage | Path],
    run: Run,
    conditions: ConditionImages | None = None,
) -> None:
    """Emit the image, then the path of its film, once film and sheets are in the run's folder.

    Args:
        engine: The loaded model.
        settings: The prompt, and the layers to watch.
        progress: Receives steps, the image "picture" and the film's path.
        run: The run. Its folder gets film.webp, steps.png and, with layers, layers.png and words.png.
        conditions: Images that steer the run.

    Raises:
        InputError: The content filter objects to an image.
    """
    [entry], size = settings.prompts, (settings.width, settings.height)
    pipe = steered(engine, settings, conditions)
    progress.begin("drawing", settings.num_steps, *size)
    steps, attention = watch(pipe, entry.prompt, entry.seed, settings, progress=False, on_step=progress.step)
    progress.begin("decoding the steps", len(steps))
    [final] = pipe.decode(steps[-1].latent, *size, settings.watermark)
    progress.emit(MadeImage("picture", engine.check(final), entry.prompt, entry.seed))
    film = Film.of(pipe, entry.prompt, steps, attention, final, on_step=progress.advance)
    for name, sheet in film.sheets():
        metadata = image_metadata(run.settings, entry.prompt, entry.seed)
        save_image(sheet, run.folder / f"{name}.png", metadata)
    film.save(run.folder / "film.webp")
    progress.emit(run.folder / "film.webp")


def run_film(
    studio: Studio,
    session: Session,
    settings: ResolvedLayer,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[tuple[Update[MadeImage | Path], Run]]:
    """Make the film, and yield each update with its run. Images may steer it, by their fields."""
    conditions = read_conditions(settings, steering)

    def work(progress: Progress[MadeImage | Path], run: Run) -> None:
        make_film(studio.engine, settings, progress, run, conditions)

    return studio.run(session, settings, work, steering)
