"""Files of settings written for a test, and the one line that a wrong one ends with."""

import json
from pathlib import Path

import pytest

from flux.errors import InputError
from flux.settings import files
from flux.settings.files import read_settings


class SettingsFolder:
    """An empty current folder, with an empty configs/ in it."""

    def __init__(self, path: Path, monkeypatch):
        self.path = path
        monkeypatch.chdir(path)
        monkeypatch.setattr(files, "CONFIGS", path / "configs")
        (path / "configs").mkdir()

    def __call__(self, cls, data, **overrides):
        """Write `data` to file.json and read it with `overrides` over it."""
        (self.path / "file.json").write_text(json.dumps(data))
        return read_settings(cls, "file.json", overrides)


def message_of(function, *args, **kwargs) -> str:
    """Return the one line of the InputError that a call ends with."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message
