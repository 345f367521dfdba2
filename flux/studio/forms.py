"""The fields that the page's forms and the endpoints send, checked and turned into settings."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from flux.attention.watch import check_watch
from flux.errors import InputError
from flux.images.given import file_names
from flux.images.outpaint import Borders, outpaint
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
from flux.settings.doses import DOSES
from flux.settings.edits import Edit, EditSettings
from flux.settings.effect import settings_warnings, without_effect
from flux.settings.resolved import ResolvedEdit, ResolvedGenerate, ResolvedLayer, ResolvedScan
from flux.settings.train import TrainSettings
from flux.studio.state import Studio
from flux.vocabulary import vocabulary_warnings

Form = Mapping[str, Any]
"""The values of a form by name. They are not yet checked: a program may send anything."""

SAMPLING = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt")
DOSE_FIELDS = ("weight", "inject_from", "inject_until", "falling")
SIDES = ("left", "right", "above", "below")
MOST_STRENGTH = 2.0  # of a LoRA, of its factors, and of images that steer a run
MOST_OVERLAP = 0.25  # of the mask and the image that is continued, as a fraction of its sides
MOST_TRAINING_STEPS = 300
TRAINING_SAMPLES = 4  # times at which a training makes samples
TRAINING = {
    "rank": 16,
    "learning_rate": 0.002,
    "sample_prompts": ["a [trigger] on the grass", "a dog on the grass"],
}
"""Settings with which flux-nano learns a subject in some hundred steps, as in configs/train.json."""
INTEGERS = ("width", "height", "num_steps", "seed", "top", "count", "steps")


# ---- settings


def generate_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Makes the settings of the Generate tab. Raises InputError for values that cannot be used."""
    return _drawn_settings(studio, form, conditions_in(form))


def conditions_in(form: Form) -> dict[str, Any]:
    """Names the images of a form that steer a run, as they are saved beside its run.json."""
    conditions: dict[str, Any] = {}
    if form.get("control"):
        conditions["control"] = "control.png"
    if form.get("fill"):
        conditions |= {"fill": "fill.png", "mask": "mask.png"}
    if form.get("redux"):
        conditions["redux"] = file_names("redux", 1)
        conditions["redux_strength"] = _number_in(form, "redux_strength", MOST_STRENGTH)
    return conditions


def _drawn_settings(studio: Studio, form: Form, conditions: Mapping[str, Any]) -> ResolvedGenerate:
    """Makes the settings of images that are drawn.

    Args:
        studio: The studio.
        form: The prompt, and how to sample.
        conditions: What the settings say about images that steer the run.
    """
    fields = values_of(form, *SAMPLING, "seed", "count", "strength")
    count = 1 if (given := fields.pop("count")) is None else given
    if type(count) is not int or not 1 <= count <= studio.limits.images:
        raise InputError(f"count: expected an integer from 1 to {studio.limits.images}, got {count!r:.60}")
    prompt = text_in(form, "prompt")
    studio.limits.check_texts([prompt, text_in(form, "negative_prompt")], 2, "texts")
    settings = resolve(
        studio.settings(GenerateSettings, {**fields, **conditions, "prompts": [prompt] * count})
    )
    studio.limits.check_size(settings)
    return settings


def instruct_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Makes the settings of an edit by instruction. Raises InputError for values that cannot be used."""
    count, most = len(form["context"] or ()), studio.limits.contexts
    if not 1 <= count <= most:
        got = f"{count} context images" if count else "no context image"
        raise InputError(f"Got {got}: give 1 to {most}, the images that the instruction is for")
    strength = _number_in(form, "reference_strength", MOST_STRENGTH)
    conditions = {"context": file_names("context", count), "reference_strength": strength}
    return _drawn_settings(studio, form, conditions)


def fill_settings(studio: Studio, form: Form, size: tuple[int, int]) -> ResolvedGenerate:
    """Makes the settings of an image that is filled.

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
        overlap = _number_in(form, "overlap", MOST_OVERLAP)
        image = Image.new("RGB", studio.limits.fill_size(size, borders))
        width, height = outpaint(image, borders, overlap)[1].size
        how = {"outpaint": borders, "overlap": overlap}
    form = {**form, "width": width, "height": height}
    return _drawn_settings(studio, form, {"fill": "fill.png", **how})


def borders_in(form: Form) -> Borders | None:
    """Takes what is painted around an image from a form, or returns None if a mask is filled.

    Raises:
        InputError: A border is no number from 0 to 1.
    """
    if not form.get("outpaint"):
        return None
    left, right, above, below = (_number_in(form, side, 1) for side in SIDES)
    return left, right, above, below


def lora_settings(studio: Studio, form: Form) -> ResolvedGenerate:
    """Makes the settings of the LoRA tab. Raises InputError for values that cannot be used."""
    if not form["lora"]:
        raise InputError("Got no LoRA: drop its .safetensors file first")
    settings = generate_settings(studio, {**form, "count": 1})
    strength = form.get("weight")
    if strength is None or not _is_factor(strength):
        raise InputError(f"weight: expected a number from 0 to {MOST_STRENGTH:g}, got {strength!r:.60}")
    factors = factors_in(form["layers"], studio.spec.num_layers)
    lora = Lora(file=form["lora"], weight=float(strength), layers=factors or None)
    return settings.model_copy(update={"lora": (*settings.lora, lora)})


def train_settings(studio: Studio, form: Form) -> TrainSettings:
    """Makes the settings of a training. Raises InputError for values that cannot be used."""
    if not form["images"]:
        raise InputError("Got no images to train on: drop a handful first")
    trigger = text_in(form, "trigger").strip()
    studio.limits.check_texts([trigger], 1, "texts")
    if not trigger:
        raise InputError("trigger: expected the words that call what is learnt")
    fields = values_of(form, "steps", "seed")
    steps, layers = fields["steps"], form.get("layers")
    if type(steps) is not int or not 1 <= steps <= MOST_TRAINING_STEPS:
        raise InputError(f"steps: expected an integer from 1 to {MOST_TRAINING_STEPS}, got {steps!r:.60}")
    if layers not in ("vital", "all"):
        raise InputError(f"layers: expected vital or all, got {layers!r:.60}")
    fields |= {"images": form["images"], "trigger": trigger, "layers": layers, **TRAINING}
    fields |= {"save_every": steps, "sample_every": max(1, steps // TRAINING_SAMPLES)}
    return studio.settings(TrainSettings, fields)


def edit_settings(studio: Studio, form: Form) -> ResolvedEdit:
    """Makes the settings of the Edit tab. Raises InputError for values that cannot be used."""
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
    """Makes the settings of a scan. The same request gets the same folder, so that a scan resumes.

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
    """Makes the settings of a film. Raises InputError for values that cannot be used."""
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
    """Lists words that the model does not know or see, settings without effect, and rounded sizes."""
    vocabulary = studio.spec.vocabulary
    warnings = vocabulary_warnings(_texts_once(settings), vocabulary) if vocabulary else []
    warnings += unseen_words(studio, settings)
    warnings += settings_warnings(_with_uploads(settings, form), studio.spec)
    for side in ("width", "height"):
        if form[side] not in (None, (used := getattr(settings, side))):
            warnings.append(f"{side} {form[side]} is rounded down to {used}, a multiple of 16")
    return warnings


def notes_about(studio: Studio, make: Callable[[Studio, Form], ModelSettings], form: Form) -> dict[str, str]:
    """Lists what is wrong with single fields of a form, and which have no effect, by their names.

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
    notes = without_effect(_with_uploads(settings, form), studio.spec)
    return {name: f"Without effect: {reason}." for name, reason in notes}


def unseen_words(studio: Studio, settings: ModelSettings) -> list[str]:
    """Lists the words of these settings that are beyond the length of the model's text encoder."""
    return unseen_words_warnings(studio.engine.reader, _texts_once(settings))


def _texts_once(settings: ModelSettings) -> list[str]:
    return list(dict.fromkeys(texts_in(settings)))


def _with_uploads(settings: ModelSettings, form: Form) -> ModelSettings:
    """Names the uploads of a form in its settings, which are made without them."""
    uploads = {name: "upload" for name in ("image", "photo") if form.get(name)}
    return settings.model_copy(update=uploads)


def texts_in(settings: ModelSettings) -> list[str]:
    """Lists every text of the settings that the model reads."""
    texts: list[str] = []
    if isinstance(settings, EditSettings):
        texts = [settings.prompt or "", *(entry.prompt for entry in settings.entries)]
    elif isinstance(settings, PromptSettings):
        texts = [entry.prompt for entry in settings.prompts]
    elif isinstance(settings, TrainSettings):
        texts = [settings.trigger or ""]
    return [*texts, settings.negative_prompt]


# ---- single fields


def values_of(form: Form, *names: str) -> dict[str, Any]:
    """Takes fields from a form, with whole numbers as integers: browsers send 20.0 for 20."""

    def integer(name: str, value: Any) -> Any:
        whole = name in INTEGERS and isinstance(value, float) and value.is_integer()
        # A larger number stays a float, so that an error message shows it in few digits.
        return int(value) if whole and abs(value) < 2**63 else value

    return {name: integer(name, form.get(name)) for name in names}


def text_in(form: Form, name: str) -> str:
    """Takes a text from a form, "" if none was typed. Raises InputError for a value that is not a text."""
    text = form.get(name)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{name}: expected a text, got {text!r:.60}")
    return text or ""


def _number_in(form: Form, name: str, most: float) -> float:
    value = form.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InputError(f"{name}: expected a number from 0 to {most:g}, got {value!r:.60}")
    return float(value)


def layers_on(value: Any, num_layers: int) -> tuple[int, ...]:
    """Takes layer numbers from a strip's value or a list. Raises InputError for layers that do not exist."""
    layers = value.get("on") if isinstance(value, dict) else value
    if not isinstance(layers, list | tuple) or not all(
        type(layer) is int and 0 <= layer < num_layers for layer in layers
    ):
        raise InputError(
            f"Got the layers {layers!r:.60}, expected a list of numbers from 0 to {num_layers - 1}"
        )
    return tuple(sorted(set(layers)))


def factors_in(value: Any, num_layers: int) -> dict[int, float]:
    """Takes the factors of a LoRA's strength from the value of sliders, for the layers where it is not 1.

    Raises:
        InputError: Values that no sliders have.
    """
    on = layers_on(value, num_layers)
    given = value.get("factors") if isinstance(value, dict) else None
    try:
        factors = {int(layer): factor for layer, factor in (given or {}).items()}
    except (AttributeError, ValueError):
        factors = {-1: 0.0}
    if not all(0 <= layer < num_layers and _is_factor(factor) for layer, factor in factors.items()):
        raise InputError(f"Got the factors {given!r:.60}, expected numbers from 0 to {MOST_STRENGTH:g}")
    used = {layer: float(factor) if layer in on else 0.0 for layer, factor in sorted(factors.items())}
    return {layer: factor for layer, factor in used.items() if factor != 1}


def _is_factor(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= MOST_STRENGTH


def parse_edits(text: str) -> list[str | dict]:
    """Reads one edit per line. A line that begins with ">" is a further turn of the edit above it."""
    edits: list[str | dict] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        prompt = line.lstrip("> ").strip()
        if not line.startswith(">") or not edits:
            edits.append(prompt)
            continue
        last = edits[-1]
        edit = {"prompt": last, "then": []} if isinstance(last, str) else last
        edit["then"].append(prompt)
        edits[-1] = edit
    return edits


def format_edits(edits: Sequence[str | Edit]) -> str:
    """Writes edits as the text that `parse_edits` reads."""
    lines = []
    for edit in edits:
        turns = () if isinstance(edit, str) else edit.then
        lines.append(edit if isinstance(edit, str) else edit.prompt)
        lines += [f"> {turn if isinstance(turn, str) else turn.prompt}" for turn in turns]
    return "\n".join(lines)


def dose_values(name: Any) -> dict[str, float | bool]:
    """Looks up the numbers of a dose that the page shows. An unknown dose has none."""
    dose = next((dose for known, dose in DOSES.items() if known == name), None)
    return {field: getattr(dose, field) for field in DOSE_FIELDS} if dose else {}
