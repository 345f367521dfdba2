"""Tokenizers: a damaged, missing or swapped one is refused in one line, before anything is loaded."""

import json
import shutil

import pytest
from helpers import weight_files

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights import find
from flux.weights.find import find_model
from flux.weights.hub import TEXT_FOLDERS
from flux.weights.open_model import ModelFiles, OpenModel
from flux.weights.tokenizers import check_tokenizer, load_tokenizer

NAMES = ("tokenizer", "tokenizer_2")


@pytest.fixture
def folder(tmp_path):
    """The small model's text encoders in a folder of one's own, to be damaged."""
    for name in TEXT_FOLDERS:
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    return tmp_path


def without_vocabulary(folder):
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()


def without_files(folder):
    for file in folder.iterdir():
        file.unlink()


def pointer(folder):
    (folder / "tokenizer.json").write_bytes(weight_files.LFS_POINTER)


def cut_short(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:1000])


def emptied(folder):
    (folder / "tokenizer.json").write_bytes(b"")


def zeroed(folder):
    path = folder / "tokenizer.json"
    path.write_bytes(bytes(path.stat().st_size))


def without_words(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "model": {**content["model"], "vocab": []}}))


def config_cut_short(folder):
    path = folder / "tokenizer_config.json"
    path.write_bytes(path.read_bytes()[:20])


HARMS = {
    without_vocabulary: "without its vocabulary",
    without_files: "without its vocabulary",
    pointer: "run `git lfs pull`",
    cut_short: "JSON is broken",
    emptied: "is empty",
    zeroed: "is empty",
    without_words: "has no vocabulary",
    config_cut_short: "JSON is broken",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_damage_is_told_when_files_are_found(folder, name, harm, monkeypatch):
    """Before a transformer of 24 GB is downloaded."""
    monkeypatch.setattr(find, "own_file", lambda *_: pytest.fail("went on to the other files"))
    harm(folder / name)
    with pytest.raises(InputError, match=HARMS[harm]) as caught:
        find_model(ModelSettings(text_encoders=str(folder)))
    assert "\n" not in str(caught.value)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocabulary"])
def test_swapped_folders(folder, form):
    if form == "vocabulary":
        for name in NAMES:
            (folder / name / "tokenizer.json").unlink()
    (folder / "tokenizer").rename(folder / "other")
    (folder / "tokenizer_2").rename(folder / "tokenizer")
    (folder / "other").rename(folder / "tokenizer_2")
    with pytest.raises(InputError, match=r"expected CLIP's: swap|is another encoder's"):
        find_model(ModelSettings(text_encoders=str(folder)))


@pytest.mark.parametrize("name", NAMES)
def test_the_package_and_downloads_are_checked_too(folder, name):
    """Their folders come without a check when they are found."""
    pointer(folder / name)
    files = ModelFiles(NANO_FOLDER / "transformer.safetensors", NANO_FOLDER / "ae.safetensors", folder)
    with pytest.raises(InputError, match="git lfs pull"):
        OpenModel(configs["flux-nano"], files).check()


def test_what_only_loading_shows(folder):
    """The format is right, the content is not."""
    path = folder / "tokenizer_2" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = [["a"]]
    path.write_text(json.dumps(content))
    check_tokenizer(path.parent, "tokenizer_2")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(path.parent, "tokenizer_2", 372)


def test_more_tokens_than_the_encoder_has():
    with pytest.raises(InputError, match="of 372 tokens for an encoder of 371"):
        load_tokenizer(NANO_FOLDER / "tokenizer_2", "tokenizer_2", 371)


def test_clips_older_form(folder):
    """FLUX.1's own repository has vocab.json and merges.txt."""
    (folder / "tokenizer" / "tokenizer.json").unlink()
    find_model(ModelSettings(text_encoders=str(folder))).check()
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json or vocab\.json with merges\.txt"):
        find_model(ModelSettings(text_encoders=str(folder)))
