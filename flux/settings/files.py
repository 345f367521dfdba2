"""How a JSON file of settings is found, read and checked.

Every wrong entry ends as one line that names the file, the field and what was expected there.
"""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError

from flux.errors import InputError
from flux.settings.demos import Edit, Lora, Prompt, Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEMOS = ("test", "layer", "skip", "dino", "edit")  # by number: demo_0_test.py to demo_4_edit.py
# Fields that may name something beside the JSON file, as those of a studio's run.json do.
PICTURES = {"image", "photo", "mask"}
WEIGHTS = {"weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders"}

S = TypeVar("S", bound=Settings)


def read_settings(cls: type[S], file: str | os.PathLike, overrides: Mapping[str, Any] | None = None) -> S:
    """The settings in a JSON file, with what the command line says put over them.

    `file` is looked for as given, then in configs/. It may be a run.json: then its "settings" are taken.
    Pictures and weights that it names are looked for beside it, then as given.
    `overrides` maps fields (dashes equal underscores) to values as `fire` parsed them. They win: a seed over
    those in the list of prompts too, a field over its counterpart too (`top` over `threshold`).
    Raises InputError, one line, for a file or a value that cannot be used.
    """
    path = _find(file)
    data = _settings_in(cls, path)
    typed = {}
    for name, value in (overrides or {}).items():
        name = name.replace("-", "_")
        typed[name] = _from_command_line(cls, name, value)
    if any(typed.get(name) is not None for name in cls.either):
        data = {name: value for name, value in data.items() if name not in cls.either}
    data |= typed
    sources = dict.fromkeys(typed, "command line")  # of the fields that do not come from `path`
    if "prompts" in cls.model_fields and isinstance(data.get("prompts"), str):
        named_by = sources.get("prompts", path)
        data["prompts"], sources["prompts"] = _read_prompts(data["prompts"], path.parent, named_by)
    if "seed" in typed and isinstance(data.get("prompts"), list):
        data["prompts"] = [_without_seed(entry) for entry in data["prompts"]]
    for name in (PICTURES | WEIGHTS) & data.keys() - typed.keys():
        data[name] = _beside(path, data[name])
    settings = check_settings(cls, data, path, sources)
    if getattr(settings, "lora", ()) and "lora" not in typed:
        loras = tuple(lora.model_copy(update={"file": _beside(path, lora.file)}) for lora in settings.lora)
        settings = settings.model_copy(update={"lora": loras})
    return settings


def check_settings(
    cls: type[S],
    data: Mapping[str, Any],
    source: Path | str | None = None,
    others: Mapping[str, Path | str] | None = None,
) -> S:
    """The settings that these fields make.

    Raises InputError, one line that begins with the `source` of the wrong field, or with its own in `others`.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        field, message = _describe(error, cls, data)
        place = (others or {}).get(field, source)
        raise InputError(f"{place}: {message}" if place else message) from None


def _settings_in(cls: type[Settings], path: Path) -> dict[str, Any]:
    """The top-level object of `path`, or the "settings" in it if a demo wrote the file."""
    data = _load(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object {{...}} at the top, got {_show(data)}")
    if "settings" not in data:
        return data
    demo = data.get("demo", cls.demo)
    if demo != cls.demo:
        script = f", run demo_{DEMOS.index(demo)}_{demo}.py with it" if demo in DEMOS else ""
        raise InputError(f'{path}: got a run of demo {_show(demo)}, expected one of "{cls.demo}"{script}')
    if not isinstance(data["settings"], dict):
        raise InputError(f"{path}: settings: expected an object {{...}}, got {_show(data['settings'])}")
    return data["settings"]


def _read_prompts(name: str, beside: Path, named_by: Path | str) -> tuple[list, Path]:
    """The list in the JSON file `name`, and the path of that file."""
    try:
        path = _find(name, beside)
    except InputError as error:
        hint = 'a prompt itself is written as a list: ["..."]'
        raise InputError(f"{named_by}: prompts: {error}; {hint}") from None
    prompts = _load(path)
    if not isinstance(prompts, list):
        raise InputError(f"{path}: expected a list of prompts [...], got {_show(prompts)}")
    return prompts, path


def _beside(path: Path, name: Any) -> Any:
    """What is called so beside the file `path` if it is there, else the name itself."""
    there = isinstance(name, str) and name and os.path.exists(path.parent / name)
    return str(path.parent / name) if there else name


def _without_seed(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return prompt
    return {key: value for key, value in prompt.items() if key != "seed"}


def _find(name: str | os.PathLike, beside: Path | None = None) -> Path:
    """The file called `name`: as given, else in the folder `beside`, else in configs/."""
    folders = [Path(), beside, CONFIGS] if beside else [Path(), CONFIGS]
    candidates = list(dict.fromkeys(folder / str(name) for folder in folders))
    for path in candidates:
        # os.path, unlike Path, also says no to what is too long to be a name, such as a prompt.
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    if any(os.path.isdir(path) for path in candidates):
        raise InputError(f"expected a JSON file, got the folder {_show(str(name))}")
    looked = ["the current folder" if path.parent == Path() else str(path.parent) for path in candidates]
    raise InputError(f"no file {_show(str(name))}, looked in {', '.join(looked)}")


def _load(path: Path) -> Any:
    """What the JSON file `path` holds."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (from byte {error.start} on), save it as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path}: broken JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a field twice, a number too long, lists too deep
        raise InputError(f"{path}: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object")
    return data


def _from_command_line(cls: type[Settings], name: str, value: Any) -> Any:
    """What was meant where `fire` saw a literal: --prompt 7, --prompt "red, blue", --layers 5."""
    value = _lists(value)
    if name not in cls.model_fields or value is None:
        return value
    kinds = _kinds(cls.model_fields[name].annotation)
    if bool in kinds and value in ("true", "false"):  # as JSON writes them
        return value == "true"
    if kinds <= {str, type(None)}:
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if tuple in kinds and not isinstance(value, list):
        # A text may stand for itself: "all", "auto", or the file of the prompts.
        return value if isinstance(value, str) and (str in kinds or name == "prompts") else [value]
    return value


def _lists(value: Any) -> Any:
    return [_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


def _kinds(annotation: Any) -> set[type]:
    """The outermost types of an annotation: `Annotated[tuple[int, ...], ...] | None` -> {tuple, NoneType}."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {origin or annotation}


# ---- one line for the user

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
    "model_type": 'a string or {{"prompt": "...", "seed": 0}}',
    "literal_error": "{expected}",
    "too_short": "at least one entry",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le}",
}


def _describe(error: ValidationError, cls: type[Settings], data: Mapping) -> tuple[str | None, str]:
    """The field of the first problem, and a line about it that counts the others."""
    problems = error.errors(include_url=False)
    # A misspelt field goes first: it explains the missing one.
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    kind, loc, context = problem["type"], problem["loc"], problem.get("ctx", {})
    if kind in ("extra_forbidden", "missing"):
        *loc, name = loc
        fields = ({"edits": Edit, "lora": Lora}.get(loc[0], Prompt) if loc else cls).model_fields
        missing = f"missing field {name!r}"
        message = f"{missing}: {fields[name].description}" if kind == "missing" else _unknown(name, fields)
    elif kind == "value_error":
        message = str(context["error"])
    else:
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else problem["msg"]
        message = f"expected {expected}, got {_show(problem['input'])}"
    path = _path(loc, data)
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return next(iter(problem["loc"]), None), (f"{path}: " if path else "") + message + others


def _unknown(name: str, fields: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
    return f"unknown field {name!r}, {hint}"


def _path(loc: Iterable[str | int], data: Any) -> str:
    """`loc` as the user would write it: ("layers", "sets", 1, 0) -> "layers[1][0]"."""
    path = ""
    for part in loc:
        if isinstance(part, int) and isinstance(data, list | tuple):
            path, data = f"{path}[{part}]", data[part]
        elif isinstance(part, str) and isinstance(data, Mapping) and part in data:
            path, data = f"{path}.{part}" if path else part, data.get(part)
        # Else the user did not write it: the tag of a union's branch, the "prompt" of a plain text.
    return path


def _show(value: Any) -> str:
    """`value` as JSON, on one line of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-35:]}"
