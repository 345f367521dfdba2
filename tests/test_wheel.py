"""The package installed from its wheel, without a checkout."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from flux.settings.files import CONFIGS

ROOT = CONFIGS.parent
PARTS = ("flux", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The contents of the wheel, as pip puts them into site-packages."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [wheel] = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    wheel.unlink()
    return site


def test_configs_are_found_elsewhere(site, tmp_path):
    code = """
import flux
from flux.settings import EditSettings, GenerateSettings, read_settings
from flux.settings.ablate import AblateSettings
print(flux.__file__)
print(read_settings(EditSettings, "edit.json").model, read_settings(EditSettings, "flux-dev/edit.json").model)
print(len(read_settings(GenerateSettings, "test.json", {"prompts": "prompts.json"}).prompts))
print(read_settings(AblateSettings, "ablate.json").lora[0].file)
"""
    alone = {**os.environ, "PYTHONPATH": str(site)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert ended.stderr == ""
    package = site / "flux"
    *others, lora = ended.stdout.split()
    assert others == [str(package / "__init__.py"), "flux-nano", "flux-dev", "64"]
    assert lora == str(package / "assets" / "nano" / "schnell_lora.safetensors"), "named by configs/"


def test_every_file_of_the_package_is_there(site):
    """Of the studio, of flux-nano, of configs/; only what Python writes itself is not."""

    def files(folder):
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        return {path for path in found if path.suffix != ".pyc"}

    assert files(ROOT / "flux") <= files(site / "flux")
    assert files(ROOT / "configs") == files(site / "flux" / "configs")
