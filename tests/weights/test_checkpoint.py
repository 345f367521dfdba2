"""Checkpoints: one file, or a folder with one file or its shards."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_models, weight_files
from safetensors.torch import save_file

from flux.errors import InputError
from flux.weights.checkpoint import open_checkpoint


def test_folders_with_half_precision_beside_the_plain_form(tmp_path, source):
    model = tiny_models.diffusers_transformer(source)
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert weight_files.same(weight_files.load(tmp_path), source)


def test_shards(tmp_path, source):
    """A missing one, one that the index does not fit, and an index that names files elsewhere."""
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path, max_shard_size="20KB")
    [index] = tmp_path.glob("*.index.json")
    whole, first = json.loads(index.read_text()), sorted(tmp_path.glob("*.safetensors"))[0]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        weight_files.load(tmp_path)
    save_file({"other": torch.zeros(1)}, first)
    with pytest.raises(InputError, match="does not fit its index"):
        weight_files.load(tmp_path)
    first.write_bytes(kept)
    for place in (tmp_path, index):
        assert weight_files.same(weight_files.load(place), source)
    name = next(iter(whole["weight_map"]))
    for wrong in ("../elsewhere.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], name: wrong}}))
        with pytest.raises(InputError, match="expected files beside it"):
            weight_files.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "a folder without .safetensors or .gguf files"),
        (["pytorch_model.bin"], "a pickle, never loaded"),
        (["a.safetensors", "b.safetensors"], r"several files \(a.safetensors, b.safetensors\)"),
    ],
)
def test_folders_without_one_file(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(np.zeros(9, np.uint8).tobytes())
    with pytest.raises(InputError, match=message):
        weight_files.load(tmp_path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="a folder without"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"Got https://hub.example/.* an address: download the file"):
        open_checkpoint(Path("https://hub.example/flux1-dev.safetensors"))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("flux1-dev_Q8_0.gguf", r"\(did you mean flux1-dev-Q8_0.gguf\?\)$"),
        ("quite-different.safetensors", "file$"),
        ("started.safetensors", r"\(started.safetensors.part beside it is unfinished\)$"),
    ],
)
def test_a_missing_file_with_what_may_have_been_meant(tmp_path, name, hint):
    for other in ("flux1-dev-Q8_0.gguf", "started.safetensors.part"):
        (tmp_path / other).touch()
    with pytest.raises(InputError, match=f"does not exist: give the path of .*{hint}"):
        open_checkpoint(tmp_path / name)


def test_a_repository_of_the_hub_in_place_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"does not exist: .* hf download some-one/some.repo --local-dir some"
    ):
        open_checkpoint(Path("some-one/some.repo"))


def test_paths_that_the_system_refuses(tmp_path, monkeypatch):
    """Names that are too long, pipes, and folders and files of other users end in one line too."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="which is no file"):
        open_checkpoint(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        open_checkpoint(tmp_path / ("long" * 100))

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as closed:
        closed.setattr(os, "stat", refuse)
        with pytest.raises(InputError, match="cannot be read: Permission denied"):
            open_checkpoint(tmp_path / "m.safetensors")
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)
