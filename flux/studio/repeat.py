"""A run as a command, and as a program, that repeats it bit for bit."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from flux.settings.complete import resolve
from flux.settings.conditions import ConditionSettings
from flux.settings.demos import GenerateSettings, LayerSettings, ModelSettings, PromptSettings
from flux.settings.edits import EditSettings
from flux.settings.files import read_settings

FILES: dict[type[ModelSettings], str] = {
    GenerateSettings: "test.json",
    LayerSettings: "layer.json",
    EditSettings: "edit.json",
}
CALLS: dict[type[ModelSettings], tuple[str, tuple[str, ...]]] = {
    GenerateSettings: ("generate", ("prompts",)),
    LayerSettings: ("watch", ("prompts",)),
    EditSettings: ("edit", ("prompt", "edits")),
}
"""The method of `flux.Pipeline` for each kind of settings, and the fields that it takes without a name."""
LOADED = (
    "weights", "ae_weights", "t5_weights", "clip_weights", "text_encoders", "lora", "device", "dtype",
    "offload", "quantize", "t5", "tiled", "compile",
)  # fmt: skip


def as_command(settings: ModelSettings) -> str:
    """Write the command line that repeats a run, from the folder that its input files are in."""
    file, fields = FILES[type(settings)], settings.to_json()
    given = {"model": settings.model, **_conditions(settings)}
    usual = resolve(read_settings(type(settings), file, given, prints=False)).to_json()
    words = ["python", settings.program, file]
    if settings.model != type(settings).model_fields["model"].default:
        words += ["--model", settings.model]
    for name, value in _named(settings, fields, usual).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = "" if value is None else text
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def as_python(settings: ModelSettings) -> str:
    """Write the program that repeats a run, from the folder that its input files are in."""
    cls, fields = type(settings), settings.to_json()
    method, unnamed = CALLS[cls]
    needed = {name: fields[name] for name in unnamed}
    usual = resolve(cls(model=settings.model, **needed, **_conditions(settings))).to_json()
    named = _named(settings, fields, usual)
    load = {name: named.pop(name) for name in LOADED if name in named}
    first = list(needed.values())
    if isinstance(settings, PromptSettings):
        entries = [entry.model_dump() for entry in settings.prompts]
        first = [entries[0]["prompt"] if len(entries) == 1 else entries]
        named |= {"seed": entries[0]["seed"]} if len(entries) == 1 else {}
    named = {name: value for name, value in named.items() if name not in (*unnamed, "model")}
    call = [*map(repr, first), *(f"{name}={value!r}" for name, value in named.items())]
    lines = ["from flux import Pipeline", ""]
    lines += [f"pipe = Pipeline.load({', '.join([repr(settings.model), *_assigned(load)])})"]
    lines += [f"result = pipe.{method}(", *(f"    {argument}," for argument in call), ")"]
    return "\n".join([*lines, 'result.save("output")', ""])


def _named(settings: ModelSettings, fields: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields that must be given because they differ from the usual ones."""
    # The prompts of these kinds carry their own seeds, which a seed of the run would replace.
    own = {"output_dir", "seed"} if isinstance(settings, PromptSettings) else {"output_dir"}
    given = _conditions(settings)
    return {
        name: value
        for name, value in fields.items()
        if (value != usual[name] or name in given) and name not in own
    }


def _conditions(settings: ModelSettings) -> dict[str, Any]:
    """List the images that steer a run, without which some models run not at all."""
    return settings.named_conditions() if isinstance(settings, ConditionSettings) else {}


def _assigned(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in values.items()]
