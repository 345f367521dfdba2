"""Layer numbers in texts and files, read by the nodes and by this package alike."""

import json

import pytest

from comfyui.layers import PRESETS, block_of, parse_layers, read_vital_layers, scan_record
from flux import vital_layers
from flux.errors import InputError
from flux.specs import configs


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0, 1, 17-19", (0, 1, 17, 18, 19)), ("", ()), ("3 3,3", (3,)), (" 56 ", (56,)), ("2-2", (2,))],
)
def test_texts_are_numbers_and_ranges(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "1.5", "all", "0-9999999999"])
def test_other_texts_are_told(text):
    with pytest.raises(ValueError, match="write numbers and ranges"):
        parse_layers(text)


def test_presets_are_this_packages():
    for name, layers in PRESETS.items():
        assert sorted(layers) == sorted(vital_layers.PRESETS[name.removesuffix(" (FLUX.1 dev)")])


def test_double_stream_blocks_come_first():
    assert [block_of(layer, 19) for layer in (0, 18, 19, 56)] == [
        ("double", 0), ("double", 18), ("single", 0), ("single", 37),
    ]  # fmt: skip


def record(model="flux-nano", **changes):
    protocol = {"layers": "all", "prompts": ["a dog"]}
    whole = scan_record(model, 5, 10, {0: 0.2, 4: 0.5, 7: 0.1}, (4, 0), {"top": 2}, protocol)
    return {**whole, **changes}


def test_this_package_reads_what_the_scan_node_writes(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps(record(vitality={f"{n:02d}": {"vitality": n} for n in range(15)})))
    assert read_vital_layers(path) == (4, 0)
    assert vital_layers.find_vital_layers(str(path), configs["flux-nano"]) == (4, 0)


def test_a_scan_of_another_model_is_refused_by_this_package(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps(record("flux-dev")))
    with pytest.raises(InputError, match="a scan of flux-dev"):
        vital_layers.find_vital_layers(str(path), configs["flux-nano"])


def test_nodes_read_the_files_without_a_format(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text('{"model": "flux-dev", "vital_layers": [1, 0, 2]}')
    assert read_vital_layers(path) == (1, 0, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 'no list "vital_layers"'),
        ("[]", 'no list "vital_layers"'),
        ('{"vital_layers": []}', "no list of layer numbers"),
        ('{"vital_layers": ["1"]}', "no list of layer numbers"),
        ('{"vital_layers": [1], "format": 3}', "format 3: these nodes read up to 2"),
        ('{"vital_layers": [1], "format": "a"}', "format 'a': these nodes read up to 2"),
    ],
)
def test_other_files_are_told(tmp_path, text, words):
    path = tmp_path / "vital_layers.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_vital_layers(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="which is no file"):
        read_vital_layers(tmp_path / "vital_layers.json")
