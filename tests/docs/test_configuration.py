"""The page of all fields is what the settings classes say now."""

import importlib.util
from types import NoneType
from typing import get_args

import pytest
from helpers.markdown import ROOT


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("writer", ROOT / "docs" / "write_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(writer):
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == writer.text(), "run python docs/write_configuration.py"


def test_every_field_stands_on_it(writer):
    text = writer.text()
    for settings in writer.COMMANDS.values():
        for name, field in settings.model_fields.items():
            rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` | ")]
            if name not in ("output_dir", "batch_size"):  # one row for all programs
                rows = [row for row in rows if (field.description or "").replace("|", "\\|") in row]
            assert rows, name


def test_every_number_has_a_unit(writer):
    for settings in writer.COMMANDS.values():
        for name, field in settings.model_fields.items():
            kinds = {field.annotation, *get_args(field.annotation)} - {NoneType}
            if kinds & {int, float}:
                assert name in writer.UNITS, name
