"""A folder whose files of settings are read."""

import pytest
from helpers.settings_files import SettingsFolder


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes `data` to a file, and reads it as settings."""
    return SettingsFolder(tmp_path, monkeypatch)
