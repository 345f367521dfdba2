"""Write docs/configuration.md from the settings classes and the programs' parameters.

python docs/write_configuration.py
"""

import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flux.cli import main as flux_main
from flux.evaluate.settings import EvaluateSettings
from flux.settings import conditions, demos, edits
from flux.settings.ablate import AblateSettings
from flux.settings.captions import CaptionSettings
from flux.settings.command_line import fields_of, type_name
from flux.settings.fields import MAX_SEED
from flux.settings.train import TrainSettings

ROOT = Path(__file__).parents[1]

COMMANDS: dict[str, type[BaseModel]] = {
    "demo 0": demos.GenerateSettings,
    "demo 1": demos.LayerSettings,
    "demo 2": demos.SkipSettings,
    "demo 3": demos.DinoSettings,
    "demo 4": edits.EditSettings,
    "`flux.scan`": demos.ScanSettings,
    "`flux.lora ablate`": AblateSettings,
    "`flux.lora train`": TrainSettings,
    "`flux.evaluate`": EvaluateSettings,
    "`flux.captions`": CaptionSettings,
    "`python -m flux`": demos.SessionSettings,
    "`demo_gr.py`": demos.ModelSettings,
}

SECTIONS: list[tuple[str, type[BaseModel], str]] = [
    ("The model and its sampling", demos.ModelSettings, ""),
    ("Prompts", demos.PromptSettings, ""),
    ("One image on several GPUs", demos.Divisible, ""),
    ("Many images on several GPUs", demos.Shareable, "[Several GPUs](several-gpus.md) shows how."),
    (
        "Images that steer",
        conditions.ConditionSettings,
        "[Conditions](conditions.md) shows what each is for, and which models take it.",
    ),
    ("Demo 0: images", demos.GenerateSettings, ""),
    ("Demo 1: layers and words", demos.LayerSettings, ""),
    ("Demo 2: layers skipped", demos.SkipSettings, ""),
    ("Which layers count as vital", demos.SelectionSettings, "Exactly one of `top`, `threshold` and `gap`."),
    ("Demo 3: scores", demos.DinoSettings, ""),
    ("Demo 4: edits", edits.EditSettings, ""),
    (
        "Demo 4: how much is injected",
        edits.DoseSettings,
        "For all edits, or in an edit's object. [Editing](editing.md#how-much-doses) has the doses' numbers.",
    ),
    ("flux.scan", demos.ScanSettings, ""),
    ("flux.lora ablate", AblateSettings, ""),
    (
        "flux.lora train",
        TrainSettings,
        "[Training a LoRA](training-loras.md) says when to change them.",
    ),
    (
        "flux.evaluate",
        EvaluateSettings,
        "A method has a `name` and fields of demo 4, such as `num_steps`, `inversion` and the dose's; or "
        "`strength`, for image-to-image. [Comparing methods](editing.md#comparing-methods) says more.",
    ),
    ("flux.captions", CaptionSettings, "[Captions](captions.md) has the kinds of models."),
    ("python -m flux", demos.SessionSettings, ""),
]

OBJECTS: list[tuple[str, type[BaseModel]]] = [
    ("An entry of `prompts`", demos.Prompt),
    ("An entry of `lora`", demos.Lora),
    ("An entry of `edits`, and of `then`", edits.Edit),
]

UNITS = {
    "width": "pixels",
    "height": "pixels",
    "num_steps": "steps",
    "guidance": "scale",
    "true_cfg": "scale",
    "cfg_from": "fraction of the steps",
    "mimic_scale": "scale",
    "mimic_percentile": "fraction of the values",
    "batch_size": "images",
    "seed": "number",
    "strength": "fraction of the schedule",
    "reference_strength": "factor",
    "context_every": "steps",
    "redux_strength": "factor",
    "lora_scale": "factor",
    "outpaint": "fraction of the sides",
    "overlap": "fraction of the sides",
    "cache": "relative change",
    "layers": "layer numbers",
    "at_steps": "step numbers from 0",
    "scale": "fraction",
    "seeds": "images a prompt",
    "workers": "processes",
    "parallel": "GPUs",
    "top": "layers",
    "threshold": "vitality",
    "weight": "fraction",
    "inject_from": "fraction of the steps",
    "inject_until": "fraction of the steps",
    "vital_layers": "layer numbers",
    "sizes": "pixels",
    "rank": "columns of a factor",
    "alpha": "scale times rank",
    "learning_rate": "length of a step",
    "steps": "training steps",
    "save_every": "training steps",
    "sample_every": "training steps",
    "caption_dropout": "fraction",
    "training_guidance": "scale",
    "nudging": "factor",
    "count": "edits",
    "max_side": "pixels",
    "max_new_tokens": "tokens",
    "port": "port",
}
"""The unit of each number."""

OF_THE_MODEL: dict[str, str] = dict.fromkeys(
    ("width", "height", "num_steps", "guidance", "true_cfg", "watermark"), "the model's"
)
OF_THE_DOSE: dict[str, str] = dict.fromkeys(edits.DoseSettings.model_fields, "the dose's")
OF_THE_RUN: dict[str, str] = dict.fromkeys(("dose", "parts", "guidance"), "the run's")
LEFT_OPEN: dict[type[BaseModel], dict[str, str]] = {
    demos.ModelSettings: OF_THE_MODEL,
    edits.DoseSettings: OF_THE_DOSE,
    edits.Edit: OF_THE_DOSE | OF_THE_RUN,
}
"""The meaning of a field that is not set, where there is one."""

HEAD = """# Configuration

Every field of every JSON file. Each field is also an option on the command line: `"num_steps": 20` in a file
is `--num_steps 20` there. Lists are written as JSON. `--help` of a program prints the same lines.

A program that does not know a field ends with one line, which names the nearest field that it knows. A file
of settings is looked for as given, then in `configs/`. The `run.json` of a run is such a file too.

`python docs/write_configuration.py` writes this page from the settings classes.
"""


def own_fields(cls: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields that a class declares, without those that only change a base's default."""
    bases = [base.model_fields for base in cls.__mro__[1:] if issubclass(base, BaseModel)]
    found = {}
    for name in inspect.get_annotations(cls):
        field = cls.model_fields.get(name)
        described = {fields[name].description for fields in bases if name in fields}
        only_a_default = name in ("output_dir", "batch_size") and described
        if field and field.description not in described and not only_a_default:
            found[name] = field
    return found


def default_of(name: str, field: FieldInfo, cls: type[BaseModel] | None = None) -> str:
    """Return a field's default in words. `cls` is the class that declares it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return LEFT_OPEN.get(cls or BaseModel, {}).get(name, "not set")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(f"`{each}`" for each in value) or "none"
    return f"`{value}`" if value != "" else "empty"


def defaults_of(name: str, cls: type[BaseModel]) -> str:
    """Return the defaults of a field, by command where they differ."""
    found: dict[str, list[str]] = {}
    for command, settings in COMMANDS.items():
        if issubclass(settings, cls):
            found.setdefault(default_of(name, settings.model_fields[name], cls), []).append(command)
    if len(found) < 2:
        return next(iter(found))
    usual = max(found, key=lambda default: len(found[default]))
    others = [f"{default} ({', '.join(users)})" for default, users in found.items() if default != usual]
    return "; ".join([usual, *others])


def bounds_of(cls: type[BaseModel], name: str) -> str:
    """Return the bounds of a number: "0 to 1", "at least 1"."""
    schema: Mapping[str, Any] = cls.model_json_schema()["properties"].get(name, {})
    for each in [schema, *schema.get("anyOf", ())]:
        low, over = each.get("minimum"), each.get("exclusiveMinimum")
        high, under = each.get("maximum"), each.get("exclusiveMaximum")
        start = f"over {over:g}" if over is not None else f"{low:g}" if low is not None else ""
        if start and under is not None:
            return f"{start} to under {under:g}"
        if start and high is not None and high < MAX_SEED:
            return f"{start} to {high:g}"
        if start:
            return start if over is not None else f"at least {start}"
    return ""


def row(name: str, field: FieldInfo, default: str, bounds: str = "") -> str:
    """Return a field's line of a table."""
    kind = type_name(field.annotation)
    values = " ".join(f"`{value}`" for value in kind.split("|")) if "|" in kind else kind
    cells = [f"`{name}`", f"{values} {bounds}".strip(), default, UNITS.get(name, ""), field.description or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(rows: list[str]) -> list[str]:
    """Return a table of fields."""
    return ["| field | values | default | unit | what it says |", "|---|---|---|---|---|", *rows, ""]


def takers(cls: type[BaseModel]) -> str:
    """Return the commands that take a class's fields."""
    return ", ".join(command for command, settings in COMMANDS.items() if issubclass(settings, cls))


def parameter_rows(main: Callable[..., object], known: Collection[str]) -> list[str]:
    """Return the lines of a program's parameters that are no fields."""
    fields = fields_of(main)
    return [row(name, field, default_of(name, field)) for name, field in fields.items() if name not in known]


def studio_main() -> Callable[..., object]:
    """Return the function of demo_gr.py."""
    spec = importlib.util.spec_from_file_location("demo_gr", ROOT / "demo_gr.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return inspect.unwrap(module.main)


def index() -> list[str]:
    """Return the table of which command takes which field."""
    names = sorted({name for settings in COMMANDS.values() for name in settings.model_fields})
    lines = [
        "## Which command takes what",
        "",
        f"| field | {' | '.join(COMMANDS)} |",
        "|---" * (len(COMMANDS) + 1) + "|",
    ]
    for name in names:
        marks = ["✓" if name in settings.model_fields else "" for settings in COMMANDS.values()]
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    return [*lines, ""]


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield HEAD
    for heading, cls, text in SECTIONS:
        yield f"## {heading}\n"
        yield f"Taken by {takers(cls)}.{' ' if text else ''}{text}\n"
        fields = own_fields(cls)
        rows = [row(n, field, defaults_of(n, cls), bounds_of(cls, n)) for n, field in fields.items()]
        if cls is demos.SessionSettings:
            rows += parameter_rows(flux_main, cls.model_fields)
        yield from table(rows)
    yield "## demo_gr.py\n"
    yield "Besides the fields of the model and its sampling:\n"
    known = demos.ModelSettings.model_fields.keys() - {"output_dir"}
    yield from table(parameter_rows(studio_main(), known))
    yield "## Objects in lists\n"
    for heading, cls in OBJECTS:
        yield f"### {heading}\n"
        fields = cls.model_fields
        yield from table([row(n, f, default_of(n, f, cls), bounds_of(cls, n)) for n, f in fields.items()])
    yield from index()


def text() -> str:
    """Return the page."""
    return "\n".join(page()).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(text(), encoding="utf-8")
