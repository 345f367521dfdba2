"""Single values of a form, checked: numbers, texts, layers, factors, edits as lines, and doses."""

from collections.abc import Mapping, Sequence
from typing import Any

from flux.errors import InputError
from flux.images.sizes import TOKEN
from flux.settings.doses import DOSES
from flux.settings.edits import Edit

Form = Mapping[str, Any]
"""The values of a form by name. They are not yet checked: a program may send anything."""

DOSE_FIELDS = ("weight", "inject_from", "inject_until", "falling")
INTEGERS = ("width", "height", "num_steps", "seed", "top", "count", "steps", "context_every")
MOST_STRENGTH = 2.0  # of a LoRA, of its factors, and of images that steer a run


def values_of(form: Form, *names: str) -> dict[str, Any]:
    """Take fields from a form, whole numbers as integers (browsers send 20.0 for 20), sides rounded down."""

    def usable(name: str, value: Any) -> Any:
        # A larger number stays a float, so that an error message shows it in few digits.
        if name in INTEGERS and isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            value = int(value)
        # The page says so, and not the terminal, as `resolve` would.
        is_side = name in ("width", "height") and type(value) is int and value >= TOKEN
        return value // TOKEN * TOKEN if is_side else value

    return {name: usable(name, form.get(name)) for name in names}


def text_in(form: Form, name: str) -> str:
    """Take a text from a form, "" if none was typed. Raise InputError for a value that is not a text."""
    text = form.get(name)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{name}: expected a text, got {text!r:.60}")
    return text or ""


def number_in(form: Form, name: str, most: float) -> float:
    """Take a number from a form. Raise InputError unless it is from 0 to `most`."""
    value = form.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InputError(f"{name}: expected a number from 0 to {most:g}, got {value!r:.60}")
    return float(value)


def integer_in(form: Form, name: str, most: int) -> int:
    """Take an integer from a form. Raise InputError unless it is from 1 to `most`."""
    value = values_of(form, name)[name]
    if type(value) is not int or not 1 <= value <= most:
        raise InputError(f"{name}: expected an integer from 1 to {most}, got {value!r:.60}")
    return value


def layers_on(value: Any, num_layers: int) -> tuple[int, ...]:
    """Take layer numbers from a strip's value or a list. Raise InputError for layers that do not exist."""
    layers = value.get("on") if isinstance(value, dict) else value
    if not isinstance(layers, list | tuple) or not all(
        type(layer) is int and 0 <= layer < num_layers for layer in layers
    ):
        raise InputError(
            f"Got the layers {layers!r:.60}, expected a list of numbers from 0 to {num_layers - 1}"
        )
    return tuple(sorted(set(layers)))


def factors_in(value: Any, num_layers: int) -> dict[int, float]:
    """Take the factors of a LoRA's strength from the value of sliders, for the layers where it is not 1.

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
    """Read one edit per line. A line that begins with ">" is a further turn of the edit above it."""
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
    """Write edits as the text that `parse_edits` reads."""
    lines = []
    for edit in edits:
        turns = () if isinstance(edit, str) else edit.then
        lines.append(edit if isinstance(edit, str) else edit.prompt)
        lines += [f"> {turn if isinstance(turn, str) else turn.prompt}" for turn in turns]
    return "\n".join(lines)


def dose_values(name: Any) -> dict[str, float | bool]:
    """Look up the numbers of a dose that the page shows. An unknown dose has none."""
    dose = next((dose for known, dose in DOSES.items() if known == name), None)
    return {field: getattr(dose, field) for field in DOSE_FIELDS} if dose else {}
