"""Headers: what a path holds that is no complete weight file is said in one readable line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from helpers import weight_files

from flux.errors import InputError
from flux.weights.checkpoint import open_checkpoint
from flux.weights.load import read_weights


def header(data: dict) -> bytes:
    text = json.dumps(data).encode()
    return struct.pack("<Q", len(text)) + text


WHOLE = header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16)


CONTENTS = {
    "an LFS pointer": (weight_files.LFS_POINTER, "Git-LFS pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html>Sign in</html>" * 20, "web page"),
    "a torch file": (b"PK\x03\x04" + bytes(64), "pickle"),
    "a bare pickle": (b"\x80\x02}q\x00." + bytes(64), "pickle"),
    "an empty file": (b"", "cut short"),
    "a few bytes": (WHOLE[:5], "cut short"),
    "only zeros": (bytes(1000), "full of zeros.*cut short"),
    "cut in the header": (WHOLE[:30], "header.*cut short"),
    "cut in the data": (WHOLE[:-3], f"{len(WHOLE) - 3} bytes, expected {len(WHOLE)}"),
    "bytes too many": (WHOLE + b"x", f"{len(WHOLE) + 1} bytes, expected {len(WHOLE)}"),
    "a header of another kind": (header({"a": 1}), "header is broken"),
    "offsets that are no numbers": (
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}),
        "header",
    ),
    "a kind of number nobody knows": (
        header({"a": {"dtype": "F3", "shape": [4], "data_offsets": [0, 16]}}) + bytes(16),
        "header|F3",
    ),
}


@pytest.mark.parametrize("what", CONTENTS)
def test_files_that_are_no_weights(tmp_path, what):
    content, expected = CONTENTS[what]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        read_weights(path, "cpu", torch.float32)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_whole_file_passes(tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(WHOLE)
    assert read_weights(tmp_path / "weights.safetensors", "cpu", torch.bfloat16)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("length", [ord("<"), 0x80])
def test_a_header_whose_length_looks_like_another_format(tmp_path, length):
    """The first byte of a good file may be that of a web page or a pickle."""
    text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "weights.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(4))
    assert read_weights(tmp_path / "weights.safetensors", "cpu", torch.float32)["a"].tolist() == [0]


@pytest.mark.parametrize("what", ["no permission", "cut while it is read"])
def test_files_that_cannot_be_read(tmp_path, monkeypatch, what):
    path = tmp_path / "m.safetensors"
    path.write_bytes(WHOLE)
    checkpoint = open_checkpoint(path)
    if what == "no permission":

        def refuse(*_, **__):
            raise OSError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    else:
        path.write_bytes(WHOLE[:-8])
    with pytest.raises(InputError, match=r"Permission denied|ends too early"):
        checkpoint.tensors["a"].read()
