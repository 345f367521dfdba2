"""A finished sweep for all tests of a file."""

import shutil

import pytest
from helpers.sweep import run_sweep


@pytest.fixture(scope="module")
def swept(nano, tmp_path_factory):
    """The folder of a finished sweep."""
    return run_sweep(nano, tmp_path_factory.mktemp("swept"))


@pytest.fixture
def copy(swept, tmp_path):
    """A copy of the finished sweep, to be damaged."""
    return shutil.copytree(swept, tmp_path / "copy")
