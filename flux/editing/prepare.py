"""From the edits that a user wrote to those that run, before a model is loaded."""

from PIL import Image

from flux.captions.captioner import describe_image
from flux.editing.photo import Photograph
from flux.images.sizes import natural_size
from flux.runtime.devices import pick_device
from flux.settings.complete import resolve
from flux.settings.edits import EditSettings
from flux.settings.resolved import ResolvedEdit
from flux.specs import get_spec
from flux.vital_layers import find_vital_layers


def complete_edit(
    settings: EditSettings, photo: Image.Image | None = None, checkpoint: str | None = None
) -> tuple[ResolvedEdit, tuple[int, ...]]:
    """Fill in the numbers of the model, the size of a photograph's edits, and the vital layers.

    The layers are settled here, so that a run.json repeats its run after "auto" has come to mean others.

    Args:
        settings: As the user wrote them.
        photo: The photograph to edit, if there is one.
        checkpoint: The fingerprint of the model's weights, if known.

    Returns:
        The settings that run, and the vital layers, the most vital first.

    Raises:
        InputError: As `resolve` and `find_vital_layers`.
    """
    spec = get_spec(settings.model)
    if photo and settings.width is None and settings.height is None:
        width, height = natural_size(photo, spec.size)
        settings = settings.model_copy(update={"width": width, "height": height})
    resolved = resolve(settings)
    layers = find_vital_layers(settings.vital_layers, spec, checkpoint)
    return resolved.model_copy(update={"vital_layers": layers}), layers


def with_caption(settings: ResolvedEdit, photo: Image.Image | None) -> ResolvedEdit:
    """Let `caption_model` write the prompt of a photograph that has none.

    Raises:
        InputError: The photograph is too small, or as `describe_image`.
    """
    if photo is None:
        return settings
    part = Photograph.of(photo, settings.width, settings.height).part  # tells of one that is too small
    if settings.prompt is not None or settings.caption_model is None:
        return settings
    prompt = describe_image(part, settings.caption_model, str(pick_device(settings.device)))
    return settings.model_copy(update={"prompt": prompt})
