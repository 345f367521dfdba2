"""The shipped files of models that an image steers. The large ones' lack the image, which the user names."""

import pytest

from flux.conditions.images import read_conditions, sized
from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, ScanSettings
from flux.settings.effect import settings_warnings
from flux.settings.files import CONFIGS, read_settings
from flux.specs import configs
from flux.vocabulary import vocabulary_warnings

IMAGES = {
    "kontext": {"context": "my.png"},
    "fill": {"fill": "my.png", "mask": "mask.png"},
    "control": {"control": "my.png"},
    "redux": {"redux": "my.png"},
}
FILES = sorted(path for path in CONFIGS.glob("flux-dev-*/*.json"))


def test_each_tool_has_one():
    """Those that are LoRAs run with the file of the model that they make."""
    tools = {name for name, spec in configs.items() if spec.condition and not spec.lora_filename}
    assert {path.parent.name for path in FILES} == tools


@pytest.mark.parametrize("kind", ["kontext", "fill", "canny"])
def test_file_of_a_small_model(kind, tmp_path, monkeypatch):
    """It runs as it is, from any folder, with an image of the package and words that the model knows."""
    monkeypatch.chdir(tmp_path)
    settings = read_settings(GenerateSettings, f"{kind}.json")
    spec = configs[settings.model]
    assert (settings.model, settings.output_dir) == (f"flux-nano-{kind}", f"output/{kind}")
    images = read_conditions(settings)
    settings = resolve(sized(settings, images))
    assert images
    assert (settings.width, settings.height) == (spec.size, spec.size)
    assert settings_warnings(settings, spec) == []
    assert vocabulary_warnings([entry.prompt for entry in settings.prompts], spec.vocabulary) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_file_of_a_tool_fits_its_model(path):
    name, kind = path.parent.name, ScanSettings if path.stem == "scan" else GenerateSettings
    spec = configs[name]
    settings = read_settings(kind, f"{name}/{path.name}", IMAGES[spec.condition])
    assert settings.model == name
    assert settings.output_dir == f"output/{name}/{path.stem}"
    assert settings.guidance == spec.guidance
    assert settings_warnings(resolve(settings), spec) == []
