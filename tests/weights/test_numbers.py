"""Damage that headers do not show is told while reading, with the file and the tensor."""

import pytest
import torch
from helpers import weight_files

from flux.errors import InputError

NAME = "double_blocks.1.img_attn.qkv.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite(tmp_path, weights, value):
    file = {name: x.clone() for name, x in weights.items()}
    file[NAME][3, 5] = value
    path = weight_files.save(file, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"m\.safetensors, where {NAME} has numbers that are NaN or inf"):
        weight_files.load(path)


def test_a_number_too_large_for_the_dtype(tmp_path, weights):
    file = {name: x.clone() for name, x in weights.items()}
    file[NAME][3, 5] = 1e6
    path = weight_files.save(file, tmp_path / "m.safetensors")
    assert weight_files.load(path, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=f"{NAME} has .* infinite in float16"):
        weight_files.load(path, dtype=torch.float16)


@pytest.mark.parametrize(
    ("dtype", "byte"),
    [
        (torch.float8_e4m3fn, 0x7F),
        (torch.float8_e4m3fn, 0xFF),
        (torch.float8_e5m2, 0x7C),
        (torch.float8_e5m2, 0xFE),
    ],
)
@pytest.mark.parametrize("keep_8bit", [False, True])
def test_a_matrix_of_8_bit_floats(tmp_path, weights, dtype, byte, keep_8bit):
    file = dict(weights)
    packed = file[NAME].to(dtype)
    path = weight_files.save({**file, NAME: packed}, tmp_path / "good")
    assert weight_files.load(path, keep_8bit=keep_8bit)
    packed.view(torch.uint8)[3, 5] = byte
    path = weight_files.save({**file, NAME: packed}, tmp_path / "bad")
    with pytest.raises(InputError, match=f"{NAME} has numbers"):
        weight_files.load(path, keep_8bit=keep_8bit)


def test_a_scale(tmp_path, weights):
    file, _ = weight_files.scaled_fp8(weights)
    file[NAME.replace("weight", "scale_weight")] = torch.tensor(float("nan"))
    with pytest.raises(InputError, match=f"the scale of {NAME}"):
        weight_files.load(weight_files.save(file, tmp_path / "m"), keep_8bit=True)


def test_a_lora(tmp_path, weights):
    base = weight_files.save(weights, tmp_path / "m")
    rows, columns = weights["img_in.weight"].shape
    file = {
        "img_in.lora_A.weight": torch.full((2, columns), float("nan")),
        "img_in.lora_B.weight": torch.ones(rows, 2),
    }
    path = weight_files.save(file, tmp_path / "lora")
    with pytest.raises(InputError, match=r"lora, where .* NaN"):
        weight_files.load(base, loras=[(path, 1.0)])


def test_a_file_of_full_size_that_was_not_filled(tmp_path):
    """As programs leave it that reserve the room first."""
    path = weight_files.save({"img_in.weight": torch.ones(2**20)}, tmp_path / "m.safetensors")
    data = bytearray(path.read_bytes())
    data[-(2**20) - 8 :] = bytes(2**20 + 8)
    path.write_bytes(data)
    (tmp_path / "m.safetensors.aria2").touch()
    with pytest.raises(InputError, match=r"last 1 MiB are zeros: .* \(m\.safetensors\.aria2 beside it is"):
        weight_files.load(path)


def test_an_unfinished_download_beside_it(tmp_path):
    path = weight_files.save({"img_in.weight": torch.ones(64)}, tmp_path / "m.safetensors")
    path.with_name("m.safetensors.incomplete").touch()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"did not finish, .* \(m\.safetensors\.incomplete beside it"):
        weight_files.load(path)
    path.unlink()
    with pytest.raises(InputError, match=r"does not exist: .*incomplete beside it"):
        weight_files.load(path)
