"""Vital layers by name, from a scan, from a list."""

import json
import pwd

import pytest

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.settings.files import check_settings
from flux.specs import VITAL_LAYERS_DEV, configs
from flux.vital_layers import PRESETS, find_vital_layers, remember_scan, remembered_scan


def test_vital_layers_by_name():
    dev, nano = configs["flux-dev"], configs["flux-nano"]
    assert find_vital_layers("auto", dev) == find_vital_layers("stable-flow", dev) == VITAL_LAYERS_DEV
    assert find_vital_layers("auto", nano) == (4, 0)
    assert set(VITAL_LAYERS_DEV) - set(find_vital_layers("stable-flow-code", dev)) == {2}
    assert find_vital_layers([3, 1], nano) == (3, 1)
    assert find_vital_layers("all", nano) == tuple(range(15))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sets_of_layers_of_dev(name):
    layers = find_vital_layers(name, configs["flux-dev"])
    assert layers == PRESETS[name]
    assert len(set(layers)) == len(layers)


def test_vital_layers_from_a_scan(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps({"vital_layers": [2, 5], "top": 2}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (2, 5)
    vitality = {"02": {"vitality": 0.1}, "05": {"vitality": 0.4}, "02-05": {"vitality": 0.5}}
    path.write_text(json.dumps({"vital_layers": [2, 5], "vitality": vitality}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (5, 2), "the most vital first"


@pytest.mark.parametrize(
    ("scanned", "model"), [("flux-dev", "flux-nano"), ("flux-nano", "flux-nano-schnell")]
)
def test_a_scan_of_another_model_is_refused(scanned, model, tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps({"model": scanned, "vital_layers": [0, 2]}))
    with pytest.raises(
        InputError, match=rf"vital_layers\.json, a scan of {scanned}, but the model is {model}:"
    ):
        find_vital_layers(str(path), configs[model])
    assert find_vital_layers(str(path), configs[scanned]) == (0, 2)


def test_a_scan_of_another_number_of_layers_is_refused(tmp_path):
    path = tmp_path / "vital_layers.json"
    vitality = {f"{layer:02d}": {"vitality": 0.1} for layer in range(12)}
    scan = {"vital_layers": [0, 2], "vitality": {**vitality, "00-02": {}}, "protocol": {"layers": "all"}}
    path.write_text(json.dumps(scan))
    with pytest.raises(InputError, match="a model with 12 layers, but flux-nano has 15"):
        find_vital_layers(str(path), configs["flux-nano"])
    path.write_text(json.dumps({**scan, "protocol": {"layers": [0, 1]}}))
    assert find_vital_layers(str(path), configs["flux-nano"]) == (0, 2)


def test_vital_layers_that_nobody_knows():
    with pytest.raises(InputError, match="not known: scan it"):
        find_vital_layers("auto", configs["flux-schnell"])


@pytest.mark.parametrize("choice", [[57], "stable-flow"], ids=str)
def test_vital_layers_that_the_model_lacks(choice):
    with pytest.raises(InputError, match=r"0\.\.14"):
        find_vital_layers(choice, configs["flux-nano"])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[0, 1]",
        '{"layers": [0]}',
        '{"vital_layers": ["0"]}',
        '{"vital_layers": [true]}',
        '{"vital_layers": [0], "vitality": {"00": 0.3}}',
        '{"vital_layers": [0], "vitality": [0.3]}',
    ],
)
def test_files_that_are_no_scans(tmp_path, content):
    path = tmp_path / "vital_layers.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"vital_layers\.json"):
        find_vital_layers(str(path), configs["flux-nano"])


def test_a_scan_that_found_no_vital_layer(tmp_path):
    path = tmp_path / "vital_layers.json"
    path.write_text('{"vital_layers": []}')
    with pytest.raises(InputError, match="a scan that found no vital layer: lower its threshold"):
        find_vital_layers(str(path), configs["flux-nano"])


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x89PNG"])
def test_files_that_are_no_text(tmp_path, content):
    (tmp_path / "scan.json").write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.json"):
        find_vital_layers(str(tmp_path / "scan.json"), configs["flux-nano"])


def test_a_name_that_is_no_preset_and_no_file():
    with pytest.raises(InputError, match="'stable-flo', which is no file and no preset"):
        find_vital_layers("stable-flo", configs["flux-nano"])


def test_without_a_home_folder_no_scan_is_remembered(tmp_path, monkeypatch, capsys):
    """As in a container whose user has no entry: pathlib raises there."""

    def unknown(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert remembered_scan("x") is None
    assert find_vital_layers("auto", configs["flux-nano"], "x") == configs["flux-nano"].vital_layers
    vitality = {"00": {"low": 0, "high": 1, "vitality": 0.5}}
    scan = {"protocol": {"layers": "all"}, "vitality": vitality, "checkpoint": "x", "vital_layers": [0]}
    path = tmp_path / "vital_layers.json"
    path.write_text(json.dumps(scan))
    assert not remember_scan(path)
    assert "there is no home folder, set XDG_CACHE_HOME" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"output_dir: expected a path without ~"):
        check_settings(ModelSettings, {"output_dir": "~/images"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remember_scan(path)
    assert remembered_scan("x").is_file()
