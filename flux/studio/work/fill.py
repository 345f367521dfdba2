"""The work of filling: an image of which a part, or what lies around it, is painted anew."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from flux.errors import InputError
from flux.images.io import read_image, save_image
from flux.images.outpaint import outpaint
from flux.settings.demos import GenerateSettings
from flux.settings.resolved import ResolvedGenerate
from flux.studio.progress import MadeImage, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.work.generate import fitted, run_generate, steering_images

GREY = (128, 128, 128)


def run_fill(
    studio: Studio,
    session: Session,
    settings: ResolvedGenerate,
    image: Image.Image,
    mask: Image.Image | None = None,
) -> Iterator[tuple[Update[MadeImage], Run]]:
    """Fill an image, and yield each update with its run.

    Args:
        studio: The studio.
        session: The visitor's session.
        settings: As `flux.studio.forms.fill_settings` makes them.
        image: The image, of any size.
        mask: White where it is painted anew, of any size. Needed unless the settings continue the image.
    """
    if settings.outpaint is not None:
        steering = {"fill": fitted(image, studio.limits.fill_size(image.size, settings.outpaint))}
    elif mask is None:
        raise InputError("Got no mask: paint over what is to be painted anew")
    else:
        steering = steering_images(settings, {"fill": image, "mask": mask})
    return run_generate(studio, session, settings, steering=steering)


def frame(image: Image.Image, borders: tuple[float, float, float, float], overlap: float) -> Image.Image:
    """Show an image in the frame in which it is continued: grey where it is painted anew."""
    canvas, mask = outpaint(image, borders, overlap)
    return Image.composite(Image.new("RGB", canvas.size, GREY), canvas, mask)


def before(run: Run) -> tuple[Path, Path]:
    """Return the files of what a run filled: the image, in its frame if it was continued, and the mask."""
    settings, image, mask = run.settings, run.folder / "fill.png", run.folder / "mask.png"
    if isinstance(settings, GenerateSettings) and settings.outpaint is not None:
        framed = run.folder / "frame.png"
        if not framed.is_file():
            source = read_image(image)
            save_image(frame(source, settings.outpaint, settings.overlap), framed)
            save_image(
                outpaint(source, settings.outpaint, settings.overlap)[1], run.folder / "frame_mask.png"
            )
        return framed, run.folder / "frame_mask.png"
    return image, mask
