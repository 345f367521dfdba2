"""Images of many prompts, batch by batch."""

from collections.abc import Iterator

from PIL import Image

from flux.images.io import crop_to_fit
from flux.loaded_model import LoadedModel
from flux.settings.resolved import ResolvedGenerate


def generate_all(
    pipe: LoadedModel, settings: ResolvedGenerate, image: Image.Image | None = None, progress: bool = True
) -> Iterator[Image.Image]:
    """Generate the image of each prompt, `batch_size` at once, and yield each batch as soon as it is there.

    Args:
        pipe: The model.
        settings: The prompts, and how to sample.
        image: Start from this image, scaled and cropped to the size of the images, instead of from noise
            alone.
        progress: Whether to show progress bars.
    """
    start_image = crop_to_fit(image, settings.width, settings.height) if image else None
    total = len(settings.prompts)
    for start in range(0, total, settings.batch_size):
        batch = settings.prompts[start : start + settings.batch_size]
        yield from pipe.generate(
            [entry.prompt for entry in batch],
            [entry.seed for entry in batch],
            image=start_image,
            strength=settings.strength,
            cache=settings.cache,
            progress=batch_name(start, len(batch), total) if progress else False,
            **settings.sampling(),
        )


def batch_name(start: int, count: int, total: int) -> str:
    """Name the images of a batch before its progress bar: "image 3 of 8", "images 3-4 of 8"."""
    if count == total:
        return "denoise"
    return f"image {start + 1} of {total}" if count == 1 else f"images {start + 1}-{start + count} of {total}"
