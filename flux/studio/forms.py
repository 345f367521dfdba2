"""What the page's forms send, as settings say it."""

from collections.abc import Sequence
from typing import Any

from flux.settings.demos import Edit, ModelSettings
from flux.settings.doses import DOSES
from flux.studio.state import Studio
from flux.vocabulary import overlooked

SAMPLING = ("width", "height", "num_steps", "guidance", "true_cfg", "negative_prompt")


def edits_of(text: str) -> list[str | dict]:
    """One edit a line; a line that begins with ">" is a further turn of the one above it."""
    edits: list[str | dict] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        prompt = line.lstrip("> ").strip()
        if not line.startswith(">") or not edits:
            edits.append(prompt)
        elif isinstance(edits[-1], str):
            edits[-1] = {"prompt": edits[-1], "then": [prompt]}
        else:
            edits[-1]["then"].append(prompt)
    return edits


def text_of(edits: Sequence[str | Edit]) -> str:
    """The text that `edits_of` reads."""
    lines = []
    for edit in edits:
        turns = () if isinstance(edit, str) else edit.then
        lines.append(edit if isinstance(edit, str) else edit.prompt)
        lines += [f"> {turn if isinstance(turn, str) else turn.prompt}" for turn in turns]
    return "\n".join(lines)


DOSED = ("weight", "inject_from", "inject_until", "falling")


def numbers_of(dose: Any) -> dict[str, float | bool]:
    """The numbers of the dose of that name, as the page shows them; none if there is no such dose."""
    found = DOSES.get(dose) if isinstance(dose, str) else None
    return {name: getattr(found, name) for name in DOSED} if found else {}


def notices_of(studio: Studio, settings: ModelSettings, form: dict[str, Any]) -> list[str]:
    """What a program is told besides its result: words that the model overlooks, sizes that were rounded."""
    vocabulary = studio.spec.vocabulary
    notices = overlooked(dict.fromkeys(texts_of(settings)), vocabulary) if vocabulary else []
    for side in ("width", "height"):
        if form[side] not in (None, (used := getattr(settings, side))):
            notices.append(f"{side} {form[side]} is rounded down to {used}, a multiple of 16")
    return notices


def texts_of(settings: ModelSettings) -> list[str]:
    """All that the model will be told."""
    prompts = [entry.prompt for entry in getattr(settings, "entries", None) or settings.prompts]
    return [getattr(settings, "prompt", None) or "", *prompts, settings.negative_prompt]


def whole(fields: dict[str, Any]) -> dict[str, Any]:
    """Counts as integers: browsers send 20.0, and sliders 1 for 1.0."""
    counts = ("width", "height", "num_steps", "seed", "top", "count")
    return {
        # A float of hundreds of digits stays one, to be refused in few letters.
        name: int(value)
        if name in counts and isinstance(value, float) and value.is_integer() and abs(value) < 2**63
        else value
        for name, value in fields.items()
    }
