"""The report on LoRA files, on the console, as a page and as JSON."""

import json
import re

import pytest
from helpers import weight_files
from helpers.lora_files import file_of, pairs

from flux.errors import InputError
from flux.lora.__main__ import main
from flux.lora.report import layer_rows, look_into, report_text, write_report

SINGLE = ("double_blocks.1.txt_attn.qkv", "single_blocks.0.linear1", "single_blocks.2.linear2")


@pytest.fixture
def files(tiny, weights, tmp_path):
    found = []
    for name, modules in {"face.safetensors": SINGLE, "style.safetensors": ["img_in", SINGLE[0]]}.items():
        found.append(weight_files.save(file_of(pairs(weights, modules), lambda m: m, 2.0), tmp_path / name))
    return found


def test_rows_are_all_layers_side_by_side(files):
    rows = layer_rows(look_into(files))
    assert [row.label for row in rows] == [*"0123456", ""]
    assert [row.name for row in rows] == [
        "double 0", "double 1", "double 2", "single 0", "single 1", "single 2", "single 3", "outside",
    ]  # fmt: skip
    assert [row.label for row in rows if row.is_vital] == ["1", "4"]
    changed = [[bool(cell.change) for cell in row.cells] for row in rows]
    assert changed == [
        [False, False], [True, True], [False, False], [True, False], [False, False], [True, False],
        [False, False], [False, True],
    ]  # fmt: skip
    assert max(row.cells[0].share for row in rows) == 1


def test_the_report_as_text(files):
    text = report_text(look_into(files))
    assert "form: LoRA" in text
    assert "fits: flux-dev, flux-schnell" in text
    assert re.search(r"^ +1  double 1   ★ +\d\.\d+ █+ +\d\.\d+ █+$", text, flags=re.M)
    assert "relative" not in text


def test_page_and_json(files, base, tmp_path):
    """The page needs no other file, and no network."""
    reports = look_into(files, base)
    page = write_report(tmp_path / "out", reports).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "in percent of the norm of these weights" in page
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    first = data["loras"][0]["layers"]
    assert list(first) == ["01", "03", "05"]
    assert first["03"]["name"] == "single 0"
    assert first["03"]["relative"] == reports[0].by_layer[3].relative
    assert data["vital_layers"] == [1, 4]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"norms_1.png", "norms_2.png"}


def test_the_command_writes_a_page(files, capsys, tmp_path):
    main(["report", *map(str, files), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("report.html\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "missing field 'files'"),
        (["report", "nothing.safetensors"], "which does not exist"),
        (["report", __file__], "no safetensors or GGUF file"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_base_of_another_model(files, tmp_path):
    other = weight_files.save({"x": next(iter(weight_files.wide().parameters()))}, tmp_path / "x")
    with pytest.raises(InputError, match=r"expected a FLUX\.1 transformer"):
        look_into(files, other)


def test_a_wrong_command_is_answered_with_the_right_ones(capsys):
    main(["--help"])
    assert "report" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"expected a command first: .*report"):
        main(["raport"])
