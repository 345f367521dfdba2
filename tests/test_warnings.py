"""Warnings are one line each."""

import subprocess
import sys
from pathlib import Path

CODE = """
import warnings
from flux.errors import InputWarning, warn
from flux.specs import configs
from flux.vocabulary import warn_of_unknown_words
for message in ("one", "two", "one"):
    warn(message)
warn_of_unknown_words(["an elefant"] * 2, configs["flux-nano"].vocabulary)
warnings.warn("theirs")
warnings.simplefilter("ignore", InputWarning)
warn("three")
"""


def test_a_warning_is_one_line():
    """The same one is told once; Python's own keep their form; a program may filter ours."""
    command = [sys.executable, "-c", CODE]
    root = Path(__file__).parents[1]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stderr.splitlines()
    assert lines[:2] == ["warning: one", "warning: two"]
    assert lines[2].startswith("warning: This model does not know 'elefant' (near: ")
    assert lines[3].endswith("UserWarning: theirs")
    assert not [line for line in lines[4:] if line.startswith("warning")]
