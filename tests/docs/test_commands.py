"""Every command and every line of Python of the pages, run in the order in which a page has them.

Images are small and steps few. A block after `<!-- needs weights -->` (or GPUs, network, hours) is run as far
as its first error, which says what is missing.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import commands
from helpers.markdown import PAGES, blocks_of, name_of, prose_of
from PIL import Image

from flux import specs
from flux.errors import InputError

NOT_RUN = {"sh", "shell", "console", "py"}  # other names of bash and python, under which nothing would run
RUN = [page for page in PAGES if any(b.language in ("bash", "python") for b in blocks_of(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the files that the pages name; flux-nano and its kind make small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("flux-nano", "flux-nano-kontext", "flux-nano-fill", "flux-nano-canny"):
        monkeypatch.setitem(specs.configs, name, replace(specs.configs[name], num_steps=2, size=64))
    example = Path("flux", "assets", "example")
    shutil.copytree(commands.ROOT / example, example)
    Image.effect_noise((96, 96), 60).convert("RGB").save("my.png")
    mask = Image.new("L", (96, 96))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("my_mask.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save("mask.png")
    shutil.copy(specs.NANO_FOLDER / "schnell_lora.safetensors", "my_lora.safetensors")
    (tmp_path / "output" / "skip").mkdir(parents=True)
    found = {"vital_layers": [4, 0], "model": "flux-nano"}
    (tmp_path / "output" / "skip" / "vital_layers.json").write_text(json.dumps(found))
    return tmp_path


@pytest.fixture
def page_without_server(monkeypatch):
    """The studio is built, and not served."""
    from flux.studio import app

    monkeypatch.setattr(app, "serve", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("loads_once")
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_page(page, folder, page_without_server, monkeypatch, capsys):
    names: dict = {"__name__": "page"}
    for block in blocks_of(page):
        assert block.language not in NOT_RUN, f"line {block.line}"
        if block.language == "bash":
            for command in block.commands:
                run_command(command, block.needs, monkeypatch, capsys)
        elif block.language == "python":
            run_python(block, names)
        elif block.language == "json":
            json.loads(block.text)


def run_command(command, needs, monkeypatch, capsys):
    variables, words = commands.split(command)
    commands.set_variables(variables, monkeypatch)
    if not words or words[0] in commands.TOOLS:
        return
    if words[0] in ("pip", "python3") or words[:3] == ["python", "-m", "pip"]:
        commands.check_install(words)
    elif words[0] in ("bash", "cp"):
        source = next(word for word in words[1:] if not word.startswith("-"))
        assert (commands.ROOT / source).exists(), command
    elif words[:3] == ["python", "-m", "pytest"] or words[0] == "pytest":
        check_tests(words)
    else:
        assert words[0] == "python", f"unknown program: {command}"
        name, arguments = commands.program_of(words)
        expected = commands.FIRST_ERRORS[needs] if needs else ""
        if expected is None:
            commands.check_options(name, arguments, monkeypatch)
            return
        if not needs:
            arguments = commands.shrunk(name, arguments)
        ended = commands.run(name, arguments, monkeypatch, capsys)
        if needs:
            assert ended.status == 2, f"{command}\n{ended.output}"
            assert re.search(expected, ended.output), f"{command}\n{ended.output}"
        else:
            assert ended.status == 0, f"{command}\n{ended.output}"


def check_tests(words):
    paths = [word for word in words if word.startswith("tests")]
    assert not [path for path in paths if not (commands.ROOT / path).exists()]


def run_python(block, names):
    code = compile("\n" * (block.line - 1) + block.text, name_of(block.page), "exec")
    if block.needs:
        with pytest.raises(InputError, match=commands.FIRST_ERRORS[block.needs]):
            exec(code, names)
    else:
        exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_a_line(page, monkeypatch):
    """Commands inside a sentence, or below a table: their program exists and has their options."""
    found = re.findall(r"`((?:python|torchrun|pytest) [^`\n]*)`", prose_of(page))
    for text in (command for line in found for command in line.split(" && ")):
        _, words = commands.split(text.replace("...", ""))
        if words[1:2] == ["-c"]:
            compile(words[2], text, "exec")
        elif words[0] == "pytest":
            check_tests(words)
        elif len(words) > 1 and words[1] != "...":
            name, arguments = commands.program_of(words)
            commands.check_options(name, arguments, monkeypatch)
