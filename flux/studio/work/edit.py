"""Edits that keep the rest: the settings, and the work on a reference that is kept."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from flux.editing.edit import OF_REFERENCE, edit_reference
from flux.editing.reference import keep_reference
from flux.errors import InputError
from flux.settings.demos import EditSettings
from flux.studio.engine import Engine, Report, Teller
from flux.studio.forms import DOSED, SAMPLING, edits_of, numbers_of, whole
from flux.studio.limits import text_in
from flux.studio.sessions import Run, Visit
from flux.studio.state import Studio
from flux.studio.widgets import layers_on
from flux.vital_layers import PRESETS, find_vital_layers

# ---- settings and work


def edit_settings_of(studio: Studio, form: dict[str, Any]) -> EditSettings:
    """What a filled form asks for. Raises InputError where it cannot be had."""
    limits, num = studio.limits, studio.spec.num_layers
    text, prompt = text_in(form, "edits"), text_in(form, "prompt")
    lines = [line for line in text.splitlines() if line.strip()]
    limits.check_texts(lines, limits.edits, "edits")
    limits.check_texts([prompt, text_in(form, "negative_prompt")], 2, "texts")
    if not lines:
        raise InputError("Got no edit: say what the edited picture should show, one edit a line")
    layers = layers_on(form["layers"], num)
    if not layers:
        raise InputError("Got no layer to take keys and values over in: click at least one on")
    names = (*SAMPLING, "seed", "dose", "parts", "inversion", "paste_back")
    # The dose's own numbers go with its name alone, since some of it only holds where no other is given.
    own = numbers_of(form.get("dose"))
    numbers = {name: form.get(name) for name in DOSED if form.get(name) != own.get(name)}
    fields = {
        **whole({name: form.get(name) for name in names} | numbers),
        "prompt": prompt,
        "edits": edits_of(text),
        "vital_layers": layers,
    }
    return studio.checked(EditSettings, fields)


def make_reference(
    engine: Engine, settings: EditSettings, tell: Teller, photo: Image.Image | None = None
) -> Any:
    """The reference that the settings describe: the one that is kept, if it will do, else a new one, which is
    kept from then on.
    """
    layers = settings.vital_layers
    key = [getattr(settings, name) for name in OF_REFERENCE]
    key += [photo and (photo.size, photo.tobytes())]
    if engine.kept and engine.kept[0] == key and set(layers) <= set(engine.kept[1].layers):
        return engine.kept[1]
    # Before the new one is made, so that there is never memory for two.
    engine.kept = None
    if photo is not None:
        engine.check(photo)
    inverted = settings.num_steps if photo is not None and settings.inversion != "none" else 0
    tell.begin("reference", inverted + settings.num_steps, settings.width, settings.height)
    reference = keep_reference(engine.pipe, settings, layers, photo, on_step=tell.step_of, progress=False)
    engine.check(reference.picture)
    engine.kept = (key, reference)
    return reference


def make_edits(
    engine: Engine,
    settings: EditSettings,
    tell: Teller,
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> None:
    """Tells the reference and its edits, the pictures of demo 4 under their names there."""
    reference = make_reference(engine, settings, tell, photo)
    tell.made("reference", (reference.picture, settings.prompt, settings.seed))
    tell.begin("edits", settings.num_steps, settings.width, settings.height)
    pictures = edit_reference(
        engine.pipe, reference, settings.edits, settings, mask=mask, on_step=tell.step_of, progress=False
    )
    for number, (entry, picture) in enumerate(zip(settings.entries, pictures)):
        tell.made(f"edit_{number}", (engine.check(picture), entry.prompt, settings.seed))


def run_edit(
    studio: Studio,
    visit: Visit,
    settings: EditSettings,
    photo: Image.Image | None = None,
    mask: Image.Image | None = None,
) -> Iterator[tuple[Report, Run]]:
    """Makes the edits, and yields each report with the run whose folder they go to."""
    if mask is not None:
        mask = mask.resize(
            photo.size if photo else (settings.width, settings.height), Image.Resampling.NEAREST
        )
    inputs = {name: picture for name, picture in (("photo", photo), ("mask", mask)) if picture is not None}
    run = visit.begin(settings, inputs)
    work = studio.engine.run(lambda tell: make_edits(studio.engine, settings, tell, photo, mask), visit.stop)
    for report in work:
        if report.made:
            name, (picture, prompt, seed) = report.made
            run.save(name, picture, prompt, seed, layers=settings.vital_layers)
            studio.count(1)
        yield report, run


def known_layers(studio: Studio) -> tuple[tuple[int, ...], dict[int, float] | None]:
    """The layers that are on at first, and how vital each is, if this checkpoint has been scanned."""
    from flux.studio.work.scan import read_vitality
    from flux.vital_layers import remembered_scan
    from flux.weights.find import checkpoint_of

    checkpoint = checkpoint_of(studio.defaults)
    scan = remembered_scan(checkpoint) if checkpoint else None
    try:
        layers = find_vital_layers("auto", studio.spec, checkpoint)
    except InputError:
        # Nobody has scanned this model: those of FLUX.1 [dev], as far as it has them.
        layers = tuple(layer for layer in PRESETS["stable-flow"] if layer < studio.spec.num_layers)
    return layers, read_vitality(scan) if scan and scan.is_file() else None
