"""How a JSON file of settings is found, read and checked.

Every wrong entry ends as one line that names the file, the field and what was expected there.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from flux.errors import InputError
from flux.settings.ablate import AblateSettings
from flux.settings.captions import CaptionSettings
from flux.settings.demos import (
    DinoSettings,
    GenerateSettings,
    LayerSettings,
    ModelSettings,
    ScanSettings,
    Settings,
    SkipSettings,
)
from flux.settings.edits import EditSettings
from flux.settings.messages import describe_errors, show
from flux.settings.train import TrainSettings

PACKAGE = Path(__file__).resolve().parents[1]
# A checkout has the folder beside the package, a wheel inside it (setup.py).
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
READ_BY_DEMOS: tuple[type[Settings], ...] = (
    GenerateSettings,
    LayerSettings,
    SkipSettings,
    DinoSettings,
    EditSettings,
    ScanSettings,
    CaptionSettings,
    AblateSettings,
    TrainSettings,
)
PROGRAMS = {cls.demo: cls.program for cls in READ_BY_DEMOS} | {"evaluate": "python -m flux.evaluate"}
"""The program that runs with the files of each demo."""
# Files of which this room has no settings: fields that no other file has, and what such a file is.
TOLD_BY_FIELDS = {
    ("benchmark", "methods"): f"a file for {PROGRAMS['evaluate']}",
    ("rule", "vitality"): "a file of vital layers, which demo_4_edit.py takes as vital_layers",
}
# Fields that may name files beside the JSON file, as those of a studio's run.json do.
FILES = {
    "image", "images", "photo", "mask", "context", "fill", "control", "redux", "weights", "ae_weights",
    "t5_weights", "clip_weights", "text_encoders", "lora_weights", "redux_weights", "depth_model", "siglip",
}  # fmt: skip

# Fields that hold for one model. A model that is named in place of the file's brings its own.
OF_A_MODEL = ("weights", "width", "height", "num_steps", "guidance", "true_cfg", "vital_layers")

MOST_LINES = 10  # in one error

S = TypeVar("S", bound=Settings)
M = TypeVar("M", bound=ModelSettings)


def read_settings(
    cls: type[S],
    file: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    prints: bool = True,
) -> S:
    """Read settings from a JSON file and put the overrides over them.

    | what                    | where it comes from, the first that there is                                 |
    |-------------------------|------------------------------------------------------------------------------|
    | the JSON file           | the path as given; configs/                                                  |
    | a field                 | `overrides`; the file; its default                                           |
    | fields of `cls.either`, | all from `overrides` if one is there; else all from the file                 |
    | mask and outpaint       |                                                                              |
    | `prompts` as a text     | that file: as given; beside the JSON file; in configs/                       |
    | seeds of the prompts    | `seed` in `overrides`, counted on; the prompt's own; `seed`, counted on      |
    | an image, weights, LoRA | from `overrides`: as given; from the file: beside it; of the package, for    |
    |                         | files in configs/; as given                                                  |
    | numbers of the model    | `overrides`; the file, unless `overrides` names another model; the model     |

    Args:
        cls: The settings to read.
        file: A JSON file of fields, or the run.json of an earlier run, whose "settings" are read.
        overrides: Values by field, such as those of the command line.
        prints: Whether to print to stderr which numbers the model of the overrides replaces.

    Raises:
        InputError: The file cannot be read, or a value cannot be used.
    """
    path, given = _find(file), dict(overrides or {})
    data = _with_new_names(cls, _settings_in(cls, path), path)
    _check_program(cls, data, path)
    data = _with_files_beside(data, path)
    data = _without_other_model(cls, data, given, path, prints)
    data = _without_rivals(cls, data, given) | given
    sources: dict[str, Path | str] = dict.fromkeys(given, "command line")
    if "prompts" in cls.model_fields and isinstance(data.get("prompts"), str):
        named_by = sources.get("prompts", path)
        data["prompts"], sources["prompts"] = read_prompts(data["prompts"], path.parent, named_by)
    if "seed" in given and isinstance(data.get("prompts"), list):
        data["prompts"] = [_without_seed(entry) for entry in data["prompts"]]
    return check_settings(cls, data, path, sources)


def check_settings(
    cls: type[S],
    data: Mapping[str, Any],
    source: Path | str | None = None,
    others: Mapping[str, Path | str] | None = None,
) -> S:
    """Return the settings that these fields make.

    Args:
        cls: The settings to make.
        data: Values by field.
        source: Where the fields come from; errors begin with it.
        others: Where single fields come from instead.

    Raises:
        InputError: A field is missing, unknown or wrong. The message has a line for each such field.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = []
        for field, message in describe_errors(error, cls, data):
            place = (others or {}).get(field, source)
            lines.append(f"{place}: {message}" if place else message)
        if len(lines) > MOST_LINES:
            lines[MOST_LINES - 1 :] = [f"{len(lines) - MOST_LINES + 1} more problems like these"]
        raise InputError("\n".join(lines)) from None


def with_fields(cls: type[M], model: ModelSettings, fields: Mapping[str, Any]) -> M:
    """Return settings of another kind for the same model.

    Args:
        cls: The settings to make.
        model: The model, and how it runs.
        fields: Values by field. A field that is None keeps its default.

    Raises:
        InputError: As `check_settings`.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    return check_settings(cls, {**model.model_dump(exclude={"output_dir"}), **given})


# ---- the steps of reading


def _settings_in(cls: type[Settings], path: Path) -> dict[str, Any]:
    """Return the top-level object of a file, or the "settings" in it if a demo wrote the file."""
    data = _load(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object {{...}} at the top, got {show(data)}")
    if "settings" not in data:
        return data
    demo = data.get("demo", cls.demo)
    if demo != cls.demo:
        known = isinstance(demo, str) and demo in PROGRAMS
        hint = f", run {PROGRAMS[demo]} with it" if known else ""
        raise InputError(f'{path}: got a run of demo {show(demo)}, expected one of "{cls.demo}"{hint}')
    if not isinstance(data["settings"], dict):
        raise InputError(f"{path}: settings: expected an object {{...}}, got {show(data['settings'])}")
    return with_former_values(cls, data["settings"])


def with_former_values(cls: type[Settings], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run.json, with what was done before there were the fields that it lacks."""
    return {**cls.before, **recorded}


def _check_program(cls: type[Settings], data: dict[str, Any], path: Path) -> None:
    """Raise InputError if a file has fields that these settings lack, and is right for other programs."""
    if data.keys() <= cls.model_fields.keys() | cls.renamed.keys():
        return
    kinds = [what for fields, what in TOLD_BY_FIELDS.items() if set(fields) <= data.keys()]
    if not kinds:
        text = isinstance(data.get("prompts"), str)  # a file of prompts, which is not read for this
        data = data | ({"prompts": ["text"]} if text else {})
        fitting = []
        for other in READ_BY_DEMOS:
            with suppress(ValidationError):
                other.model_validate(data)
                fitting.append(other.program)
        kinds = [f"a file for {' or '.join(fitting)}"] if fitting else []
    if kinds and kinds[0] != f"a file for {cls.program}":
        raise InputError(f"{path}: got {kinds[0]}, expected one for {cls.program}")


def _with_new_names(cls: type[Settings], data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the data with the present names of fields that had others, and warn about these."""
    for old, new in cls.renamed.items():
        if old in data:
            print(f"{path}: field {old!r} is now called {new!r}", file=sys.stderr)
            data = {new if name == old else name: value for name, value in data.items()}
    return data


def _with_files_beside(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the data with the path of each file that lies beside `path` in place of its name."""
    found = {name: _beside(path, value) if name in FILES else value for name, value in data.items()}
    if isinstance(data.get("lora"), list):
        found["lora"] = [
            {**each, "file": _beside(path, each["file"])}
            if isinstance(each, dict) and "file" in each
            else _beside(path, each)
            for each in data["lora"]
        ]
    return found


def _without_other_model(
    cls: type[Settings], data: dict[str, Any], given: Mapping[str, Any], path: Path, prints: bool
) -> dict[str, Any]:
    """Return the data without OF_A_MODEL if an override names another model; may print what is left out.

    A preset or a file of vital layers stays: it says itself which model it is for, or that it is a trial.
    """
    if not issubclass(cls, ModelSettings) or "model" not in given:
        return data
    model, other = given["model"], data.get("model", cls.model_fields["model"].default)
    if model == other:
        return data
    left_out = {
        name: data[name]
        for name in OF_A_MODEL
        if data.get(name) is not None and not (name == "vital_layers" and isinstance(data[name], str))
    }
    told = [f"{name} {show(value)}" for name, value in left_out.items() if name not in given]
    if told and prints:
        print(f"{path} is for {other}: {model} brings its own in place of {', '.join(told)}", file=sys.stderr)
    return {name: value for name, value in data.items() if name not in left_out}


def _without_rivals(cls: type[Settings], data: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data without the fields of which only one may be given, if an override gives one."""
    for rivals in (cls.either, ("mask", "outpaint")):
        if any(given.get(name) is not None for name in rivals):
            data = {name: value for name, value in data.items() if name not in rivals}
    return data


def read_prompts(
    name: str, beside: Path | None = None, named_by: Path | str | None = None
) -> tuple[list[Any], Path]:
    """Return the list in the JSON file `name`, and the path of that file.

    Args:
        name: The file, as given, in the folder `beside`, or in configs/.
        beside: A folder.
        named_by: What names the file; errors begin with it. If None, the name itself.

    Raises:
        InputError: The file cannot be read, or holds no list.
    """
    try:
        path = _find(name, beside)
    except InputError as error:
        hint = 'a prompt itself is written as a list: ["..."]'
        raise InputError(f"{named_by or name}: prompts: {error}; {hint}") from None
    prompts = _load(path)
    if not isinstance(prompts, list):
        raise InputError(f"{path}: expected a list of prompts [...], got {show(prompts)}")
    return prompts, path


def _without_seed(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return prompt
    return {key: value for key, value in prompt.items() if key != "seed"}


# ---- files


def _beside(path: Path, name: Any) -> Any:
    """Return the path of the file of that name beside `path` if there is one, else the name itself.

    Files in configs/ name files of the package too, such as flux/assets/example/reference.jpg. Each entry of
    a list is looked for.
    """
    if isinstance(name, list):
        return [_beside(path, each) for each in name]
    if not isinstance(name, str) or not name:
        return name
    shipped = path.resolve().is_relative_to(CONFIGS)
    candidates = [folder / name for folder in (path.parent, *[PACKAGE.parent] * shipped)]
    return next((str(each) for each in candidates if os.path.exists(each)), name)


def _find(name: str | os.PathLike, beside: Path | None = None) -> Path:
    """Return the file called `name`: as given, else in the folder `beside`, else in configs/."""
    folders = [Path(), beside, CONFIGS] if beside else [Path(), CONFIGS]
    candidates = list(dict.fromkeys(folder / os.path.expanduser(name) for folder in folders))
    for path in candidates:
        # os.path, unlike Path, also answers for what is too long to be a name, such as a prompt.
        if os.path.exists(path) and not os.path.isdir(path):
            return path
    if any(os.path.isdir(path) for path in candidates):
        raise InputError(f"expected a JSON file, got the folder {show(str(name))}")
    looked = ["the current folder" if path.parent == Path() else str(path.parent) for path in candidates]
    raise InputError(f"no file {show(str(name))}, looked in {', '.join(looked)}")


def _load(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (from byte {error.start} on): give a JSON file, saved as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        problem = r"for each \ in a text, write / or \\" if "escape" in error.msg else error.msg
        raise InputError(f"{path}: broken JSON at {where}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a field twice, a number too long, lists too deep
        raise InputError(f"{path}: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands twice in one object")
    return data
