"""The fields that the page's forms and the endpoints send, checked and turned into settings."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from flux.attention.watch import check_watch
from flux.errors import InputError
from flux.images.given import file_names
from flux.images.outpaint import Borders, outpaint
from flux.images.sizes import TOKEN
from flux.modules.conditioner import unseen_words_warnings
from flux.scan.sweep import FREE_FIELDS
from flux.settings.complete import resolve
from flux.settings.demos import (
    GenerateSettings,
    LayerSettings,
    Lora,
    ModelSettings,
    PromptSettings,
    ScanSettings,
)
from flux.settings.edits import EditSettings
from flux.settings.effect import settings_warnings, without_effect
from flux.settings.resolved import ResolvedEdit, ResolvedGenerate, ResolvedLayer, ResolvedScan
from flux.settings.train import TrainSettings
from flux.studio.form_values import (
    DOSE_FIELDS,
    MOST_STRENGTH,
    Form,
    dose_values,
    factors_in,
    integer_in,
    layers_on,
    number_in,
    parse_edits,
    text_in,
    values_of,
)
from flux.studio.state import Studio
from flux.vocabulary import vocabulary_warnings

SAMPLING = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt")
SIDES = ("left", "right", "above", "below")
MOST_OVERLAP = 0.25  # of the mask and the image that is continued, as a fraction of its sides
MOST_TRAINING_STEPS = 300
TRAINING_SAMPLES = 4  # times at which a training makes samples
TRAINING = {
    "rank": 16,
    "learning_rate": 0.002,
    "sample_prompts": ["a [trigger] on the grass", "a dog on the grass"],
}
"""Settings with which flux-nano learns a subject in some hundred steps, as in configs/train.json."""


# ---- settings


def generate_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Make the settings of the Generate tab. Raise InputError for values that cannot be used."""
    return _drawn_settings(studio, form, conditions_in(form))


def conditions_in(form: Form) -> dict[str, Any]:
    """Name the images of a form that steer a run, as they are saved beside its run.json."""
    conditions: dict[str, Any] = {}
    if form.get("control"):
        conditions["control"] = "control.png"
    if form.get("fill"):
        conditions |= {"fill": "fill.png", "mask": "mask.png"}
    if form.get("redux"):
        conditions["redux"] = file_names("redux", 1)
        conditions["redux_strength"] = number_in(form, "redux_strength", MOST_STRENGTH)
    return conditions


def _drawn_settings(studio: Studio, form: Form, conditions: Mapping[str, Any]) -> ResolvedGenerate:
    """Make the settings of images that are drawn.

    Args:
        studio: The studio.
        form: The prompt, and how to sample.
        conditions: What the settings say about images that steer the run.
    """
    fields = values_of(form, *SAMPLING, "seed", "strength")
    count = 1 if form.get("count") is None else integer_in(form, "count", studio.limits.images)
    prompt = text_in(form, "prompt")
    studio.limits.check_texts([prompt, text_in(form, "negative_prompt")], 2, "texts")
    settings = resolve(
        studio.settings(GenerateSettings, {**fields, **conditions, "prompts": [prompt] * count})
    )
    studio.limits.check_size(settings)
    return settings


def instruct_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Make the settings of an edit by instruction. Raise InputError for values that cannot be used."""
    count, most = len(form["context"] or ()), studio.limits.contexts
    if not 1 <= count <= most:
        got = f"{count} context images" if count else "no context image"
        raise InputError(f"Got {got}: give 1 to {most}, the images that the instruction is for")
    strength = number_in(form, "reference_strength", MOST_STRENGTH)
    conditions = {"context": file_names("context", count), "reference_strength": strength}
    conditions |= values_of(form, "context_every")
    return _drawn_settings(studio, form, conditions)


def fill_settings(studio: Studio, form: Form, size: tuple[int, int]) -> ResolvedGenerate:
    """Make the settings of an image that is filled.

    Args:
        studio: The studio.
        form: The form. With borders (see `borders_in`) the image is continued, else a mask is filled.
        size: Width and height of the image in pixels.

    Raises:
        InputError: Values that cannot be used.
    """
    borders = borders_in(form)
    if borders is None:
        width, height = studio.limits.fill_size(size)
        how: dict[str, Any] = {"mask": "mask.png"}
    else:
        overlap = number_in(form, "overlap", MOST_OVERLAP)
        image = Image.new("RGB", studio.limits.fill_size(size, borders))
        width, height = outpaint(image, borders, overlap)[1].size
        how = {"outpaint": borders, "overlap": overlap}
    form = {**form, "width": width, "height": height}
    return _drawn_settings(studio, form, {"fill": "fill.png", **how})


def borders_in(form: Form) -> Borders | None:
    """Take what is painted around an image from a form, or return None if a mask is filled.

    Raises:
        InputError: A border is no number from 0 to 1, or all are 0.
    """
    if not form.get("outpaint"):
        return None
    left, right, above, below = (number_in(form, side, 1) for side in SIDES)
    if not any((left, right, above, below)):
        raise InputError("Got no border and no mask: widen left, right, above or below, or paint a mask")
    return left, right, above, below


def lora_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Make the settings of the LoRA tab. Raise InputError for values that cannot be used."""
    if not form["lora"]:
        raise InputError("Got no LoRA: drop its .safetensors file first")
    settings = generate_settings(studio, {**form, "count": 1})
    strength = number_in(form, "weight", MOST_STRENGTH)
    if not layers_on(form["layers"], studio.spec.num_layers):
        raise InputError("Got no layer to add the LoRA in: click at least one on")
    factors = factors_in(form["layers"], studio.spec.num_layers)
    lora = Lora(file=form["lora"], weight=strength, layers=factors or None)
    return settings.model_copy(update={"lora": (*settings.lora, lora)})


def train_settings(studio: Studio, form: Form) -> TrainSettings:
    """Make the settings of a training. Raise InputError for values that cannot be used."""
    if not form["images"]:
        raise InputError("Got no images to train on: drop a handful first")
    trigger = text_in(form, "trigger").strip()
    studio.limits.check_texts([trigger], 1, "texts")
    if not trigger:
        raise InputError("trigger: expected the words that call what is learnt")
    steps, layers = integer_in(form, "steps", MOST_TRAINING_STEPS), form.get("layers")
    if layers not in ("vital", "all"):
        raise InputError(f"layers: expected vital or all, got {layers!r:.60}")
    fields = {"images": form["images"], "trigger": trigger, "layers": layers, "steps": steps}
    fields |= {"save_every": steps, "sample_every": max(1, steps // TRAINING_SAMPLES), **TRAINING}
    return studio.settings(TrainSettings, {**fields, **values_of(form, "seed")})


def edit_settings(studio: Studio, form: Form) -> ResolvedEdit:
    """Make the settings of the Edit tab. Raise InputError for values that cannot be used."""
    limits, text, prompt = studio.limits, text_in(form, "edits"), text_in(form, "prompt")
    lines = [line for line in text.splitlines() if line.strip()]
    limits.check_texts(lines, limits.edits, "edits")
    limits.check_texts([prompt, text_in(form, "negative_prompt")], 2, "texts")
    if not lines:
        raise InputError("Got no edit: say what the edited image should show, one edit a line")
    layers = layers_on(form["layers"], studio.spec.num_layers)
    if not layers:
        raise InputError("Got no layer to inject keys and values in: click at least one on")
    fields = values_of(form, *SAMPLING, "seed", "dose", "parts", "inversion", "paste_back")
    # Only numbers that differ from the dose's own: a number that is given would disable `hold_subject_until`.
    own = dose_values(form.get("dose"))
    fields |= {name: form.get(name) for name in DOSE_FIELDS if form.get(name) != own.get(name)}
    fields |= {"prompt": prompt, "edits": parse_edits(text), "vital_layers": layers, **conditions_in(form)}
    settings = resolve(studio.settings(EditSettings, fields))
    studio.limits.check_size(settings)
    return settings


def scan_settings(studio: Studio, form: Form) -> ResolvedScan:
    """Make the settings of a scan. The same request gets the same folder, so that a scan resumes.

    Raises:
        InputError: Values that cannot be used.
    """
    prompts = [line.strip() for line in text_in(form, "prompts").splitlines() if line.strip()]
    studio.limits.check_texts(prompts, studio.limits.prompts, "prompts")
    if not prompts:
        raise InputError("Got no prompt to scan with: give at least one, each on its own line")
    layers = layers_on(form["layers"], studio.spec.num_layers)
    if not layers:
        raise InputError("Got no layer to scan: click at least one on")
    fields = values_of(form, *SAMPLING, "seed", "top")
    top = fields.pop("top")
    if type(top) is int and top > len(layers):
        raise InputError(f"top: expected at most {len(layers)}, the number of layers to scan, got {top}")
    fields |= {"gap": True} if top in (None, 0) else {"top": top}
    fields["layers"] = "all" if len(layers) == studio.spec.num_layers else layers
    # No metadata: it would name this machine's files, and no demo takes an image with a skipped layer.
    fields |= {"prompts": prompts, "metadata": False, **conditions_in(form)}
    settings = resolve(studio.settings(ScanSettings, fields))
    studio.limits.check_size(settings)
    free = FREE_FIELDS | {"top", "gap"}
    request = {name: value for name, value in settings.to_json().items() if name not in free}
    name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
    return settings.model_copy(update={"output_dir": str(studio.folder / "scans" / name)})


def film_settings(studio: Studio, form: Form) -> ResolvedLayer:
    """Make the settings of a film. Raise InputError for values that cannot be used."""
    prompt, text = text_in(form, "prompt"), text_in(form, "words")
    studio.limits.check_texts([prompt, text], 2, "texts")
    fields = values_of(form, *SAMPLING, "seed")
    fields["layers"] = layers_on(form["layers"], studio.spec.num_layers)
    fields["words"] = [word.strip() for word in text.split(",") if word.strip()]
    settings = resolve(studio.settings(LayerSettings, {**fields, "prompt": prompt, **conditions_in(form)}))
    studio.limits.check_size(settings)
    check_watch(settings)
    return settings


def warnings_about(studio: Studio, settings: ModelSettings, form: Form) -> list[str]:
    """List words that the model does not know or see, settings without effect, and rounded sizes."""
    vocabulary = studio.spec.vocabulary
    warnings = vocabulary_warnings(_texts_once(settings), vocabulary) if vocabulary else []
    warnings += unseen_words(studio, settings)
    warnings += settings_warnings(_with_uploads(settings, form), studio.spec)
    return warnings + [f"{side} {form[side]} is {how}" for side, how in _rounded(settings, form).items()]


def _rounded(settings: ModelSettings, form: Form) -> dict[str, str]:
    """Say of each side of the form's size that is no whole number of tokens what it is rounded to."""
    given = {side: form.get(side) for side in ("width", "height")}
    return {
        side: f"rounded down to {used}, a multiple of {TOKEN}"
        for side, value in given.items()
        if value not in (None, used := getattr(settings, side))
    }


def notes_about(studio: Studio, make: Callable[[Studio, Form], ModelSettings], form: Form) -> dict[str, str]:
    """List what is wrong with single fields of a form, rounded, or without effect, by their names.

    Args:
        studio: The studio.
        make: Makes the settings of the form, such as `generate_settings`.
        form: The form. Texts that are still missing are no mistake.
    """
    texts = {name: form[name] or "-" for name in ("prompt", "prompts", "edits") if name in form}
    try:
        settings = make(studio, {**form, **texts})
    except InputError as error:
        told = (line.partition(": ") for line in str(error).splitlines())
        return {name: f"{what[:1].upper()}{what[1:]}." for name, _, what in told if name in form}
    rounded = {side: f"{how.capitalize()}." for side, how in _rounded(settings, form).items()}
    notes = without_effect(_with_uploads(settings, form), studio.spec)
    return rounded | {name: f"Without effect: {reason}." for name, reason in notes}


def unseen_words(studio: Studio, settings: ModelSettings) -> list[str]:
    """List the words of these settings that are beyond the length of the model's text encoder."""
    return unseen_words_warnings(studio.engine.reader, _texts_once(settings))


def _texts_once(settings: ModelSettings) -> list[str]:
    return list(dict.fromkeys(texts_in(settings)))


def _with_uploads(settings: ModelSettings, form: Form) -> ModelSettings:
    """Name the uploads of a form in its settings, which are made without them."""
    uploads = {name: "upload" for name in ("image", "photo") if form.get(name)}
    return settings.model_copy(update=uploads)


def texts_in(settings: ModelSettings) -> list[str]:
    """List every text of the settings that the model reads."""
    texts: list[str] = []
    if isinstance(settings, EditSettings):
        texts = [settings.prompt or "", *(entry.prompt for entry in settings.entries)]
    elif isinstance(settings, PromptSettings):
        texts = [entry.prompt for entry in settings.prompts]
    elif isinstance(settings, TrainSettings):
        texts = [settings.trigger or ""]
    return [*texts, settings.negative_prompt]
