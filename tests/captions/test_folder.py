"""Folders of images and their texts."""

import json
import os
import re

import pytest
from helpers.images import noise

from flux.captions.folder import ImageFolder
from flux.errors import InputError


def test_images_and_their_texts(images):
    (images / "a.txt").write_text("\ufeff a dog\n", encoding="utf-8")
    (images / "b.txt").write_text(" \n")
    (images / "notes.md").write_text("not an image")
    (images / ".hidden.png").write_bytes((images / "a.png").read_bytes())
    (images / "folder.png").mkdir()
    noise().save(images / "Z.PNG")
    folder = ImageFolder.open(images)
    assert folder.images == ("Z.PNG", "a.png", "b.jpg", "c.webp", "d.png")
    assert [folder.text(name) for name in folder.images] == [None, "a dog", None, None, None]


def test_texts_of_metadata(images):
    """A .txt file goes before them."""
    lines = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.jpg", "text": "a dog", "more": 1}]
    (images / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    (images / "a.txt").write_text("mine")
    folder = ImageFolder.open(images)
    assert [folder.text(name) for name in folder.images] == ["mine", "a dog", None, None]
    (images / "captions.jsonl").write_text(json.dumps(lines[1] | {"text": "two dogs"}))
    assert ImageFolder.open(images).text("b.jpg") == "two dogs"


def test_what_is_written_is_read_as_metadata(images):
    texts = {"a.png": 'a "dog"', "b.jpg": "süß"}
    ImageFolder.open(images).write_all(texts).rename(images / "metadata.jsonl")
    assert ImageFolder.open(images).given == texts


def test_two_images_of_one_name(images):
    noise().save(images / "a.jpg")
    folder = ImageFolder.open(images)
    assert [folder.sharing(name) for name in folder.images] == [None, "a.jpg", None, None, None]


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
@pytest.mark.parametrize("line", ["{", "[]", '{"file_name": "a.png"}', '{"file_name": 1, "text": "a"}'])
def test_broken_lines(images, line, name):
    (images / name).write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(InputError, match=rf"{re.escape(name)}: line 2: expected .* got"):
        ImageFolder.open(images)


@pytest.mark.parametrize("content", ["süß".encode("latin-1"), "a dog".encode("utf-16"), bytes(9)])
def test_texts_that_cannot_be_read(images, content):
    (images / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt, which is not UTF-8 text"):
        ImageFolder.open(images).text("a.png")


def test_images_of_kinds_that_are_not_read_are_told(images):
    for name in ("x.HEIC", "y.gif", "notes.pdf"):
        (images / name).write_bytes(b"")
    with pytest.warns(
        match=r"Got x\.HEIC, y\.gif in .*, of kinds that are not read: save them as PNG or JPEG"
    ):
        assert ImageFolder.open(images).images == ("a.png", "b.jpg", "c.webp", "d.png")


def test_folders_that_are_none(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, problem in (("nothing", "does not exist"), ("file", "is a file"), ("empty", "holds no image")):
        with pytest.raises(InputError, match=problem):
            ImageFolder.open(os.path.join(tmp_path, name))
