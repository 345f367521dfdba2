"""Shell commands of the pages, run in this process: with small images, or as far as their first error."""

import ast
import importlib.util
import os
import re
import runpy
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from flux.settings import command_line
from helpers.markdown import ROOT

SMALL = {"width": "64", "height": "64"}
SHRUNK: Mapping[str, Mapping[str, str]] = {
    "demo_0_test.py": {**SMALL, "num_steps": "2", "prompts": '["a dog on the grass"]'},
    "demo_1_layer.py": {**SMALL, "num_steps": "2"},
    "demo_2_skip.py": {**SMALL, "num_steps": "1", "prompts": '["a dog on the grass"]'},
    "demo_4_edit.py": {**SMALL, "num_steps": "2", "edits": '["a cat on the grass"]'},
    "flux.scan": {**SMALL, "num_steps": "1", "prompts": '["a dog", "a cat"]', "stop_when": "never"},
    "flux.lora ablate": {**SMALL, "num_steps": "1", "prompts": '["a dog"]', "layers": "[0, 1, 2, 4, 14]"},
    "flux.lora train": {**SMALL, "num_steps": "1", "steps": "2"},
    "flux": {**SMALL, "num_steps": "2"},
}
"""Options that are added to a command unless it has them itself: it does the same work on less."""

FIRST_ERRORS = {
    "weights": "it is not on this machine|which does not exist|hub did not give it|find them in the cached",
    "GPUs": "start it with torchrun",
    "network": "it is not on this machine|needs a key",
    "cluster": None,
    "hours": None,
}
"""How a command ends without what it needs. If None, it is not started: its options alone are checked."""

TOOLS = {"ruff", "pyright", "lint-imports", "pre-commit", "mkdocs", "hf", "git"}
"""Programs of others, which are not run here."""


@dataclass
class Ended:
    """How a command ended: its status, and what it printed."""

    status: int
    output: str


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Return a command's variables and its words, without .venv/bin, torchrun and a final &."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(command.rstrip("& "))]
    variables = {}
    if words and words[0] == "export":
        words.pop(0)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words and words[0] == "torchrun":
        while not words[0].endswith(".py") and words[0] != "-m":
            words.pop(0)
        words.insert(0, "python")
    if words and words[0] == "flux":
        words = ["python", "-m", *words]
    return variables, words


def check_install(words: list[str]) -> None:
    """Check that the extras and the files that a pip command names are there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^(\w+) = \[", section, flags=re.M))
    for word in words:
        for extras in re.findall(r"\[([\w,]+)\]", word):
            assert set(extras.split(",")) <= known, word
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), word


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """Return the script or module that `python ...` runs, and its arguments."""
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    if words[1] == "-m":
        assert importlib.util.find_spec(name), f"no module {name}"
    else:
        assert (ROOT / name).is_file(), f"no file {name}"
    return name, arguments


def check_options(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a program of ours has the options that it is given, without doing its work."""
    read = []

    def only_parse(main, text, fields=None, *, positional=None, arguments=None):
        options = command_line.fields_of(main) | dict(fields or {})
        read.append(command_line.parse(options, sys.argv[1:] if arguments is None else arguments, positional))

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "run", only_parse)
        patch.setattr(sys, "argv", [name, *arguments])
        if name == "flux" or "command_line" in _source(name):
            _start(name)
    if not read:
        given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
        assert given <= _options_in(_source(name))


def _options_in(source: str) -> set[str]:
    """Return the options that argparse is told of, or that are parameters of a function main."""
    found = set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            found |= {argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]}
    return {option.replace("-", "_") for option in found}


def _source(name: str) -> str:
    if name.endswith(".py"):
        return (ROOT / name).read_text(encoding="utf-8")
    spec = importlib.util.find_spec(name)
    assert spec is not None
    path = Path(str(spec.origin))
    main = path.with_name("__main__.py")
    return (main if path.name == "__init__.py" and main.exists() else path).read_text(encoding="utf-8")


def _start(name: str) -> None:
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def shrunk(name: str, arguments: list[str]) -> list[str]:
    """Return the arguments, with those of `SHRUNK` that are not given."""
    given = {argument.partition("=")[0] for argument in arguments}
    command = f"{name} {arguments[0]}" if arguments else name  # of a program with commands
    options = SHRUNK.get(command, SHRUNK.get(name, {}))
    more = {f"--{option}": value for option, value in options.items()}
    return arguments + [word for pair in more.items() if pair[0] not in given for word in pair]


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> Ended:
    """Run a script or module in this process."""
    capsys.readouterr()
    status = 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            _start(name)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    out, err = capsys.readouterr()
    return Ended(status, out + err)


def set_variables(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set variables, without a ~, which would lead into the home of the person who runs the tests."""
    for name, value in variables.items():
        monkeypatch.setenv(name, os.path.expanduser(value))
