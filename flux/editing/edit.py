"""Edits that keep the rest of their reference (Stable Flow, section 3.2).

The reference's image keys and values are injected in the vital layers of each edit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from PIL import Image

from flux.editing.batches import Batch, start_batches
from flux.editing.photo import Mask, mask_image, token_mask
from flux.editing.reference import Reference
from flux.editing.reference_fields import reference_fields
from flux.editing.run import run_batches
from flux.editing.source import OnStep, Source, find_source
from flux.errors import InputError
from flux.images.masks import as_mask, read_mask
from flux.loaded_model import LoadedModel
from flux.modules.conditioner import cut_words, shortened
from flux.sampling import window
from flux.settings.edits import Edit, Turn
from flux.settings.files import check_settings
from flux.settings.resolved import ResolvedEdit


@dataclass(frozen=True)
class Edits:
    """A reference and its edits. Of a photograph, the reference is the autoencoder's reconstruction."""

    reference: Image.Image
    edits: list[Image.Image]


def edit(
    pipe: LoadedModel,
    settings: ResolvedEdit,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Edits:
    """Make a reference and its edits in one go: the images of `keep_reference` and `edit_reference`.

    Each step has two passes. The reference's pass keeps the image keys and values of `layers`; the edits'
    pass injects them. So no edit changes the reference, and `batch_size` changes only the memory that is
    needed. The reference of a photograph replays the path of its inversion. Nothing is kept beyond a step.

    Args:
        pipe: The models.
        settings: Settings of the reference and all edits.
        layers: The vital layers, the most vital first, see `flux.vital_layers.find_vital_layers`.
        photo: The photograph to edit, described by the prompt. If None, the reference is generated.
        mask: What edits without a mask of their own may change, see `flux.editing.photo.token_mask`.
        on_step: Called with each step, its number and the number of steps. An exception from it ends the run.
        progress: Whether to show progress bars.

    Raises:
        InputError: As `check_edits`, `check_prompts` and `flux.editing.source.find_source`.
    """
    masks = check_edits(settings, layers, photo, mask)
    if progress:
        print_shares(settings, masks)
    if settings.prompt is not None:
        check_prompts(pipe, settings, [settings.prompt])
    source = find_source(pipe, settings, photo, on_step, progress)
    if settings.prompt is None:
        check_prompts(pipe, settings, source.prompts)
    batches = start_batches(pipe, source, layers, masks)
    latent = run_batches(pipe, source, batches, on_step=on_step, progress=progress)
    [reference] = source.decode(pipe, latent)
    return Edits(source.paste_back(reference), _decode_edits(pipe, source, batches, masks))


def edit_reference(
    pipe: LoadedModel,
    reference: Reference,
    edits: Sequence[str | Edit],
    settings: ResolvedEdit,
    *,
    mask: Image.Image | None = None,
    on_step: OnStep | None = None,
    on_mask: Callable[[int, Image.Image], object] | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Make edits of a kept reference. A step computes the edits alone.

    Args:
        pipe: The models.
        reference: See `flux.editing.reference.keep_reference`.
        edits: Prompts, or prompts with settings of their own.
        settings: Settings of all edits. Their `reference_fields` must be the reference's. A list of
            `vital_layers` may name fewer layers than were kept.
        mask: What edits without a mask of their own may change, see `flux.editing.photo.token_mask`.
        on_step: Called with each step, its number and the number of steps. An exception from it ends the run.
        on_mask: Called with the number of an edit and the mask that was found for it, white where it may
            change the reference. Not called for a painted mask, nor if the whole image may change.
        progress: Whether to show a progress bar.

    Returns:
        The edits in the order of `settings.entries`.

    Raises:
        InputError: As `check_edits` and `check_prompts`; layers or queries that were not kept; settings of
            another reference.
    """
    settings = check_settings(ResolvedEdit, {**settings.model_dump(), "edits": edits})
    layers = reference.layers if isinstance(settings.vital_layers, str) else settings.vital_layers
    _check_kept(reference, settings, layers)
    source = replace(reference.source, settings=settings)
    masks = check_edits(settings, layers, source.photo and source.photo.whole, mask)
    check_prompts(pipe, settings, source.prompts)
    batches = start_batches(pipe, source, layers, masks)
    run_batches(pipe, source, batches, reference.steps, on_step, progress)
    return _decode_edits(pipe, source, batches, masks, on_mask)


def _check_kept(reference: Reference, settings: ResolvedEdit, layers: Sequence[int]) -> None:
    """Raise InputError if the edits need another reference, or more of it than was kept."""
    has_photo = reference.source.photo is not None
    wanted = reference_fields(settings, has_photo)
    kept = reference_fields(reference.source.settings, has_photo)
    if other := [name for name in wanted | kept if wanted.get(name) != kept.get(name)]:
        raise InputError(f"Got another {', '.join(other)} than the reference was kept with: keep a new one")
    if missing := sorted(set(layers) - set(reference.layers)):
        raise InputError(f"Got vital layers {missing}, but the reference was kept with {reference.layers}")
    if not settings.keeps_queries and any("q" in (entry.parts or "") for entry in settings.entries):
        raise InputError(
            "Got an edit that injects queries, but the reference was kept without them: name them in the "
            'parts of all edits, such as "qkv", and keep a new one'
        )


def check_edits(
    settings: ResolvedEdit,
    layers: Sequence[int],
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> list[Mask | None]:
    """Check the doses of all edits and read their masks.

    Args:
        settings: Settings of the edits.
        layers: The vital layers.
        photo: The photograph, if one is edited.
        mask: The mask of edits that name none. If the settings name a file, it is that of the file.

    Returns:
        The mask of each edit. None if it may change all of its image, or its mask is found while it runs.

    Raises:
        InputError: A mask that cannot be read, is of another size, or all black; a window without steps;
            weights of layers that are not vital.
    """
    size = (settings.width, settings.height)
    sizes = [photo.size, size] if photo else [size]
    has_photo = photo is not None or settings.photo is not None
    read = cache(read_mask)  # edits may share a file
    masks: list[Mask | None] = []
    for entry in settings.entries:
        _check_dose(settings, entry, layers, has_photo)
        if entry.mask is None or (mask and entry.mask == settings.mask not in ("auto", "none")):
            image = mask and as_mask(mask)
        else:
            image = None if entry.mask in ("auto", "none") else read(entry.mask)
        masks.append(Mask(image, token_mask(image, sizes, *size)) if image else None)
    return masks


def _check_dose(settings: ResolvedEdit, entry: Turn, layers: Sequence[int], has_photo: bool) -> None:
    """Raise InputError if the dose of an edit cannot be given."""
    dose = entry.effective_dose()
    window(settings.num_steps, dose.inject_from, dose.inject_until)
    if isinstance(dose.weight, Mapping) and (others := sorted(dose.weight.keys() - set(layers))):
        raise InputError(f"Got weights for layers {others}, but the vital layers are {list(layers)}")
    if entry.mask == "auto" and has_photo and settings.inversion_free:
        raise InputError(
            f'Got mask "auto" with inversion "{settings.inversion}": FlowEdit has no attention to compare'
        )


def print_shares(settings: ResolvedEdit, masks: Sequence[Mask | None]) -> None:
    """Print for each painted mask how much of the image may change, so that a wrong mask is noticed."""
    shares = {
        entry.mask or "the mask": mask.tokens.float().mean().item()
        for entry, mask in zip(settings.entries, masks)
        if mask
    }
    for name, share in shares.items():
        print(f"{name}: {max(1, round(100 * share))} % of the image may change")


def check_prompts(pipe: LoadedModel, settings: ResolvedEdit, sources: Sequence[str]) -> None:
    """Check that the model can tell the edits' prompts from their sources'.

    A prompt that is the source's letter by letter is meant so.

    Raises:
        InputError: Two different prompts become the same tokens.
    """
    for prompt, entry in product(sources, settings.entries):
        encoders = pipe.t5, pipe.clip
        if entry.prompt == prompt or any(e.token_ids(prompt) != e.token_ids(entry.prompt) for e in encoders):
            continue
        hint = "it has no tokens for what differs, choose other words"
        if cut_words(pipe.t5, prompt) or cut_words(pipe.t5, entry.prompt):
            hint = f"it sees their first {pipe.t5.max_length} tokens, shorten both"
        raise InputError(
            f"Got the edit {shortened(entry.prompt)!r}, which the model reads as the same tokens as the "
            f"reference's prompt: {hint}"
        )


def _decode_edits(
    pipe: LoadedModel,
    source: Source,
    batches: Sequence[Batch],
    masks: Sequence[Mask | None],
    on_mask: Callable[[int, Image.Image], object] | None = None,
) -> list[Image.Image]:
    """Decode the finished edits and return them in their order. Hands out the masks that were found."""
    edits: dict[int, Image.Image] = {}
    for batch in batches:
        for row, (place, image) in enumerate(zip(batch.places, source.decode(pipe, batch.latent))):
            painted, mask = masks[place], None
            if painted:
                mask = painted.image
            elif batch.mask is not None:
                mask = mask_image(batch.mask[row], *source.size)
                if on_mask and not batch.mask[row].all():
                    on_mask(place, mask)
            edits[place] = source.paste_back(image, mask)
    return [edits[place] for place in sorted(edits)]
