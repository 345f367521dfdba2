"""Edits that keep the rest: the reference's image keys and values, taken over in the vital layers (Stable
Flow, 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from flux.editing.batches import Batch, Mask, batches_of, flow, follow
from flux.editing.photo import mask_picture, token_mask
from flux.editing.reference import (
    OnStep,
    Reference,
    Source,
    ahead,
    find_source,
)
from flux.errors import InputError
from flux.images.io import read_image
from flux.pipeline import Pipeline
from flux.sampling import Step, window
from flux.settings.demos import Edit, EditSettings
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedEdit

# What edits of a kept reference may not change.
OF_REFERENCE = (
    "model", "prompt", "seed", "photo", "width", "height", "num_steps", "inversion", "nudging",
    "correct_drift", "as_published", "true_cfg", "negative_prompt", "cfg_from", "mimic_scale",
    "mimic_percentile",
)  # fmt: skip


@dataclass(frozen=True)
class Edits:
    """A reference and its edits. For a photograph, the reference is what the autoencoder makes of it."""

    reference: Image.Image
    edits: list[Image.Image]


# ---- edits


def check_edits(
    settings: EditSettings,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> list[Mask | None]:
    """The mask of each edit, from its file, or `mask` where an edit names none; None: all may change, or it
    is found on the way. The settings are complete ones.

    Raises:
        InputError: a mask that cannot be read, of another size, or all black; a window without steps; weights
            for other layers than `layers`.
    """
    size, free = (settings.width, settings.height), settings.inversion == "none" and photo is not None
    sizes = [photo.size, size] if photo else [size]
    found, read = [], {}
    for entry in settings.entries:
        dose = entry.effective_dose()
        window(settings.num_steps, dose.inject_from, dose.inject_until)
        if isinstance(dose.weight, dict) and (others := sorted(dose.weight.keys() - set(layers))):
            raise InputError(f"Got weights for layers {others}, but the vital layers are {list(layers)}")
        if entry.mask == "auto" and free:
            raise InputError('Got mask "auto" with inversion "none": FlowEdit has no attention to compare')
        if entry.mask in (None, "auto", "none"):
            picture = None if entry.mask else mask
        else:
            picture = read.setdefault(entry.mask, None) or read_image(entry.mask)
            read[entry.mask] = picture
        found.append(picture and (picture, token_mask(picture, sizes, *size)))
    return found


def _pictures(
    pipe: Pipeline,
    source: Source,
    settings: EditSettings,
    batches: Sequence[Batch],
    masks: Sequence[Mask | None],
) -> list[Image.Image]:
    """The edits decoded, in their order."""
    found = {}
    for batch in batches:
        pictures = pipe.decode(batch.latent / source.scale, *source.size, settings.watermark)
        for row, (place, picture) in enumerate(zip(batch.places, pictures)):
            mask = masks[place][0] if masks[place] else None
            if mask is None and batch.mask is not None:
                mask = mask_picture(batch.mask[row], *source.size)
            found[place] = source.placed(picture, mask)
    return [found[place] for place in range(len(found))]


def edit_reference(
    pipe: Pipeline,
    reference: Reference,
    edits: Sequence[str | Edit],
    settings: EditSettings,
    *,
    mask: Image.Image | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Edits of a kept reference, in the order of `settings.entries`; each step costs their images alone.

    Args:
        settings: complete ones, those of the reference but for what is said of edits. A list of
            `vital_layers` may name fewer layers than were kept.
        mask: where edits without one of their own may change the reference, see `flux.editing.photo.token_mask`.

    Raises:
        InputError: as `check_edits`, layers that were not kept, or settings that ask for another reference.
    """
    settings = check_settings(ResolvedEdit, {**settings.model_dump(), "edits": edits})
    source = reference.source
    other = [name for name in OF_REFERENCE if getattr(settings, name) != getattr(source.settings, name)]
    if other:
        raise InputError(f"Got another {', '.join(other)} than the reference was kept with: keep a new one")
    layers = reference.layers if isinstance(settings.vital_layers, str) else settings.vital_layers
    if others := sorted(set(layers) - set(reference.layers)):
        raise InputError(f"Got vital layers {others}, but the reference was kept with {reference.layers}")
    masks = check_edits(settings, layers, source.photo and source.photo.whole, mask)
    batches = batches_of(pipe, source, settings, layers, masks)
    total = source.num_steps * (len(batches) if source.inversion_free else 1)
    with tqdm(total=total, desc="edits", unit="step", disable=not progress) as bar, pipe.denoising() as model:

        def stepped(step: Step, index: int) -> None:
            bar.update()
            if on_step:
                on_step(step, index, total)

        if source.inversion_free:
            flow(pipe, model, source, batches, stepped)
        else:
            follow(pipe, model, source, ahead(reference.moments, pipe.device), batches, stepped)
    return _pictures(pipe, source, settings, batches, masks)


def edit(
    pipe: Pipeline,
    settings: EditSettings,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Edits:
    """A reference and its edits in one go, nothing kept beyond a step: the pictures of `keep_reference` and
    `edit_reference`.

    Each step has two passes: the reference's, which keeps the image keys and values of `layers`, then the
    edits', which take them. So no edit touches the reference, and `batch_size` of them at a time changes
    memory only. The reference of a photograph replays the path of its inversion.

    Args:
        settings: complete ones.
        layers: where the edits take over keys and values, the most vital first, see `find_vital_layers`.
        photo: edit this picture, which the prompt describes, instead of a generated one.
        mask: where edits without one of their own may change the reference, see `flux.editing.photo.token_mask`.
        on_step: called with each step, its number and how many there are; an exception from it ends the run.

    Raises:
        InputError: as `check_edits`, before any work.
    """
    masks = check_edits(settings, layers, photo, mask)
    source = find_source(pipe, settings, photo, on_step, progress)
    batches = batches_of(pipe, source, settings, layers, masks)
    done, steps = source.inverted_steps, source.num_steps
    total = steps * len(batches) if source.inversion_free else steps
    with tqdm(total=total, desc="edits", unit="step", disable=not progress) as bar, pipe.denoising() as model:

        def stepped(step: Step, index: int) -> None:
            bar.update()
            if on_step:
                on_step(step, done + index, done + total)

        if source.inversion_free:
            flow(pipe, model, source, batches, stepped)
            latent = source.start
        else:

            def keep(index: int) -> frozenset[int]:
                return frozenset().union(*(batch.takes(index) for batch in batches))

            moments = source.moments(model, pipe.image_ids(1, *source.size), keep)
            latent = follow(pipe, model, source, moments, batches, stepped)
    [picture] = pipe.decode(latent / source.scale, *source.size, settings.watermark)
    pictures = _pictures(pipe, source, settings, batches, masks)
    return Edits(source.placed(picture), pictures)
