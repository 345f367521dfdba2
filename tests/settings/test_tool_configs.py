"""The shipped files of models that an image steers: complete but for the image, which the user names."""

import pytest

from flux.settings.complete import resolve
from flux.settings.demos import GenerateSettings, ScanSettings
from flux.settings.effect import settings_warnings
from flux.settings.files import CONFIGS, read_settings
from flux.specs import configs

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


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_file(path):
    name, kind = path.parent.name, ScanSettings if path.stem == "scan" else GenerateSettings
    spec = configs[name]
    settings = read_settings(kind, f"{name}/{path.name}", IMAGES[spec.condition])
    assert settings.model == name
    assert settings.output_dir == f"output/{name}/{path.stem}"
    assert settings.guidance == spec.guidance
    assert settings_warnings(resolve(settings), spec) == []
