"""Errors of settings, a line each: the field's path, what was expected there, and the nearest known name."""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from flux.settings.demos import Lora, Prompt
from flux.settings.edits import Edit, Turn

# pydantic's name of an error -> what was expected; braces are filled from the error's context
EXPECTED = {
    "expected": "{what}",
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object {{...}}",
    "model_type": "a string or {example}",
    "literal_error": "{expected}",
    "too_short": "at least one entry",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le}",
}
EXAMPLES = {"Prompt": '{"prompt": "...", "seed": 0}', "Lora": '{"file": "...", "weight": 0.8}'}
ENTRIES: dict[str | int, type[BaseModel]] = {"edits": Edit, "lora": Lora}


def describe_errors(
    error: ValidationError, cls: type[BaseModel], data: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return a line about each problem, after the top-level field that it is in ("" if in none)."""
    problems = error.errors(include_url=False)
    # Misspelt fields go first: each one explains why the field that was meant is missing.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    lines, meant = [], set()
    for problem in problems:
        kind, loc, context = problem["type"], problem["loc"], problem.get("ctx", {})
        if kind == "too_short" and problem["input"]:
            continue  # pydantic counts only the entries that are right; the others have lines of their own
        place = loc
        if kind in ("extra_forbidden", "missing"):
            *place, name = loc
            fields = _model_at(place, cls).model_fields
            if kind == "missing" and (*place, name) in meant:
                continue
            if kind == "missing":
                message = f"missing field {name!r}: {fields[str(name)].description}"
            else:
                message = unknown_field(str(name), fields)
                meant |= {(*place, near) for near in nearest(str(name), fields)}
        elif kind == "value_error":
            message = str(context["error"])
        else:
            context["example"] = EXAMPLES.get(context.get("class_name", ""), "an object {...}")
            expected = EXPECTED[kind].format(**context) if kind in EXPECTED else problem["msg"]
            message = f"expected {expected}, got {show(problem['input'])}"
        path = path_of(place, data)
        lines.append((str(loc[0]) if loc else "", (f"{path}: " if path else "") + message))
    return lines


def _model_at(place: Sequence[str | int], cls: type[BaseModel]) -> type[BaseModel]:
    """Return the model whose fields stand at a place in the settings of `cls`."""
    if not place:
        return cls
    return Turn if "then" in place else ENTRIES.get(place[0], Prompt)


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known name that is most like this one, if any is like it."""
    return difflib.get_close_matches(name, known, n=1)


def unknown_field(name: str, known: Iterable[str]) -> str:
    """Return a message about an unknown field, with the nearest known name or all of them."""
    near = nearest(name, known)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown field {name!r}, {hint}"


def path_of(loc: Iterable[str | int], data: Any) -> str:
    """Return pydantic's path as the user would write it: ("layers", "sets", 1, 0) -> "layers[1][0]"."""
    path = ""
    for part in loc:
        if isinstance(part, int) and isinstance(data, list | tuple) and part < len(data):
            path, data = f"{path}[{part}]", data[part]
        elif isinstance(part, str) and isinstance(data, Mapping) and part in data:
            path, data = f"{path}.{part}" if path else part, data.get(part)
        # Otherwise the user did not write it: the tag of a union's branch, the "prompt" of a plain text.
    return path


def show(value: Any) -> str:
    """Return `value` as JSON, on one line of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"
