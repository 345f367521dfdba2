"""Tiny captioners, each built once, and a folder of images."""

import pytest
from helpers import captioners
from helpers.images import noise


@pytest.fixture(scope="session")
def blip(tmp_path_factory):
    return captioners.blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return captioners.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def florence(tmp_path_factory):
    return captioners.florence(tmp_path_factory.mktemp("florence"))


@pytest.fixture
def images(tmp_path):
    """A folder of four images of different contents and sizes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "c.webp", "d.png")):
        noise(50 + 10 * seed, 40, seed).save(folder / name)
    return folder
