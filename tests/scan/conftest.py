"""A finished sweep and a report for all tests of a file."""

import shutil

import pytest
from helpers.report import report, write_images
from helpers.sweep import run_sweep


@pytest.fixture(scope="module")
def swept(nano, tmp_path_factory):
    """The folder of a finished sweep."""
    return run_sweep(nano, tmp_path_factory.mktemp("swept"))


@pytest.fixture
def copy(swept, tmp_path):
    """A copy of the finished sweep, to be damaged."""
    return shutil.copytree(swept, tmp_path / "copy")


@pytest.fixture(scope="module")
def coloured_images(tmp_path_factory):
    """The folder of the report's images."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def page(coloured_images, tmp_path_factory) -> str:
    """The report."""
    return report(coloured_images, tmp_path_factory.mktemp("page") / "report.html")
