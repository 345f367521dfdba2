"""The work of the Edit tab: a reference that is kept, and edits of it."""

from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256

from PIL import Image

from flux.conditions.images import ConditionImages, read_conditions
from flux.editing.edit import check_edits, check_prompts, edit_reference
from flux.editing.reference import Reference, keep_reference
from flux.editing.reference_fields import reference_fields
from flux.errors import InputError
from flux.images.given import Images
from flux.images.io import save_image
from flux.settings.resolved import ResolvedEdit
from flux.studio.engine import Engine, KeptReference
from flux.studio.progress import MadeImage, Progress, Update
from flux.studio.sessions import Run, Session
from flux.studio.state import Studio
from flux.studio.visits import pack_mask
from flux.studio.work.generate import images_of, steered
from flux.studio.work.scan import read_vitality
from flux.vital_layers import PRESETS, find_vital_layers, remembered_scan
from flux.weights.find import checkpoint_of

FOUND_MASK = "{}_mask.png"
"""The file of the mask that was found for an edit, beside the edit's own."""


def make_reference(
    engine: Engine,
    settings: ResolvedEdit,
    progress: Progress,
    photo: Image.Image | None = None,
    conditions: ConditionImages | None = None,
) -> Reference:
    """Return the reference that the settings describe: the kept one if it fits, else a new one, then kept.

    Args:
        engine: The loaded model.
        settings: The reference, and the layers to keep.
        progress: Receives the steps.
        photo: Invert this photograph instead of generating the reference.
        conditions: Images that steer the run.

    Raises:
        InputError: The content filter objects to an image.
    """
    layers, settings = settings.named_layers, _without_mask_file(settings, conditions)
    given = [photo, *([*images_of(conditions), conditions.mask] if conditions else [])]
    pixels = [(image.mode, image.size, sha256(image.tobytes()).digest()) for image in given if image]
    key = (reference_fields(settings, photo is not None), pixels)
    kept = engine.kept
    if kept and kept.key == key and set(layers) <= set(kept.reference.layers):
        return kept.reference
    # Freed before the new one is made, so that memory never holds two.
    engine.kept = kept = None
    if photo is not None:
        engine.check(photo)
    inverted = settings.num_steps if photo is not None and settings.inverts else 0
    progress.begin("drawing the reference", inverted + settings.num_steps, settings.width, settings.height)
    pipe = steered(engine, settings, conditions)
    reference = keep_reference(pipe, settings, layers, photo, on_step=progress.step_at, progress=False)
    engine.check(reference.image)
    engine.kept = KeptReference(key, reference)
    return reference


def make_edits(
    engine: Engine,
    settings: ResolvedEdit,
    progress: Progress[MadeImage],
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
    on_mask: Callable[[int, Image.Image], object] | None = None,
    conditions: ConditionImages | None = None,
) -> None:
    """Emit the reference and its edits, under the names that demo 4 saves them with.

    Args:
        engine: The loaded model.
        settings: The reference and its edits.
        progress: Receives steps and images.
        photo: Edit this photograph instead of a generated reference.
        mask: White where the edits may change the reference. If None, as the dose says.
        on_mask: Receives the masks that are found, see `flux.editing.edit.edit_reference`.
        conditions: Images that steer the run. Edits of an image to fill may change what its mask says.

    Raises:
        InputError: The content filter objects to an image, or the edits are wrong.
    """
    settings = _without_mask_file(settings, conditions)
    if conditions and conditions.mask:
        mask = conditions.mask
    # Whatever is wrong with the edits is said before minutes go into their reference.
    check_edits(settings, settings.named_layers, photo, mask)
    check_prompts(engine.pipe, settings, [settings.prompt or ""])
    reference = make_reference(engine, settings, progress, photo, conditions)
    progress.emit(MadeImage("reference", reference.image, settings.prompt or "", settings.seed))
    progress.begin("drawing the edits", settings.num_steps, settings.width, settings.height)
    images = edit_reference(
        steered(engine, settings, conditions),
        reference,
        settings.edits,
        settings,
        mask=mask,
        on_step=progress.step_at,
        on_mask=on_mask,
        progress=False,
    )
    for number, (entry, image) in enumerate(zip(settings.entries, images)):
        progress.emit(MadeImage(f"edit_{number}", engine.check(image), entry.prompt, settings.seed))


def run_edit(
    studio: Studio,
    session: Session,
    settings: ResolvedEdit,
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[tuple[Update[MadeImage], Run]]:
    """Make the edits, and yield each update with its run.

    Args:
        studio: The studio.
        session: The visitor's session.
        settings: The reference and its edits.
        photo: Edit this photograph instead of a generated reference.
        mask: White where the edits may change the reference, of any size.
        steering: Images that steer the run, by the fields that name them.
    """
    conditions = read_conditions(settings, steering)
    if mask is not None:
        size = photo.size if photo else (settings.width, settings.height)
        mask = mask.resize(size, Image.Resampling.NEAREST)

    def work(progress: Progress[MadeImage], run: Run) -> None:
        def save_mask(number: int, found: Image.Image) -> None:
            save_image(found, run.folder / FOUND_MASK.format(f"edit_{number}"))

        make_edits(studio.engine, settings, progress, photo, mask, save_mask, conditions)

    own = {name: image for name, image in (("photo", photo), ("mask", mask)) if image is not None}
    inputs: dict[str, Images] = {**own, **(steering or {})}
    # So an image file alone brings its mask back.
    carried = {} if mask is None else {"mask": pack_mask(mask)}
    return studio.run(session, settings, work, inputs, layers=settings.vital_layers, **carried)


def run_reference(
    studio: Studio,
    session: Session,
    settings: ResolvedEdit,
    photo: Image.Image | None = None,
    steering: Mapping[str, Images] | None = None,
) -> Iterator[Update[Image.Image]]:
    """Make the reference alone, and yield each update. Nothing is saved."""
    conditions = read_conditions(settings, steering)

    def work(progress: Progress[Image.Image]) -> None:
        progress.emit(make_reference(studio.engine, settings, progress, photo, conditions).image)

    return studio.engine.run(work, session.stop)


def known_layers(
    studio: Studio, session: Session | None = None
) -> tuple[tuple[int, ...], dict[int, float] | None]:
    """Find the layers to inject in, and each layer's vitality if this checkpoint has been scanned.

    Args:
        studio: The studio.
        session: A visitor's session, whose own scan counts first. If None, the default of all visitors.
    """
    own = session and session.vital_scan(studio.defaults.model)
    if own and own.is_file():
        return find_vital_layers(str(own), studio.spec), read_vitality(own)
    checkpoint = checkpoint_of(studio.defaults)
    scan = remembered_scan(checkpoint) if checkpoint else None
    try:
        layers = find_vital_layers("auto", studio.spec, checkpoint)
    except InputError:
        # Nobody has scanned this model: those of FLUX.1 [dev], as far as it has them.
        layers = tuple(layer for layer in PRESETS["stable-flow"] if layer < studio.spec.num_layers)
    return layers, read_vitality(scan) if scan and scan.is_file() else None


def _without_mask_file(settings: ResolvedEdit, conditions: ConditionImages | None) -> ResolvedEdit:
    """Return settings that do not name the file in which a run keeps the mask of an image to fill."""
    return settings.model_copy(update={"mask": None}) if conditions and conditions.mask else settings
