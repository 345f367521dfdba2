"""Damage that headers do not show is told while reading, with the file and the tensor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import weight_files

from flux.errors import InputError, InputWarning
from flux.model import Flux
from flux.modules.gguf_blocks import BLOCKS, HALVES
from flux.weights.checkpoint import open_checkpoint

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


def test_a_scale_that_is_not_finite(tmp_path, weights):
    file, _ = weight_files.scaled_fp8(weights)
    file[NAME.replace("weight", "scale_weight")] = torch.tensor(float("nan"))
    with pytest.raises(InputError, match=f"the scale of {NAME}"):
        weight_files.load(weight_files.save(file, tmp_path / "m"), keep_8bit=True)


def test_a_lora_with_a_number_that_is_not_finite(tmp_path, weights):
    base = weight_files.save(weights, tmp_path / "m")
    rows, columns = weights["img_in.weight"].shape
    good = {
        "img_in.lora_A.weight": torch.ones(2, columns),
        "img_in.lora_B.weight": torch.ones(rows, 2),
        "img_in.alpha": torch.ones(()),
    }
    for name, x in good.items():
        path = weight_files.save({**good, name: torch.full_like(x, float("nan"))}, tmp_path / "lora")
        with pytest.raises(InputError, match=rf"lora, where {name} has numbers that are NaN"):
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


@pytest.mark.parametrize("kind", weight_files.KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_of_gguf_blocks(tmp_path, kind, value):
    """Each of a block's half-precision numbers, in the last block of a row."""
    path, name = tmp_path / "m.gguf", "double_blocks.0.img_attn.qkv.weight"
    weight_files.save_gguf(weight_files.wide().state_dict(), path, kind)
    good, tensor = path.read_bytes(), open_checkpoint(path).tensors[name].stored
    assert weight_files.load(path, weight_files.WIDE)
    size = BLOCKS[kind][1]
    for at in HALVES[kind]:
        bad = bytearray(good)
        place = tensor.offset + tensor.size - size + at
        bad[place : place + 2] = np.float16(value).tobytes()
        path.write_bytes(bad)
        with pytest.raises(InputError, match=rf"m\.gguf, where {name} has numbers that are NaN or infinite"):
            weight_files.load(path, weight_files.WIDE)


def wide_file(tmp_path):
    """A file with a matrix of 4 MiB, and where that begins and ends."""
    params = replace(weight_files.WIDE, mlp_ratio=16.0)
    path = weight_files.save(Flux(params).state_dict(), tmp_path / "m.safetensors")
    tensor = open_checkpoint(path).tensors["double_blocks.0.img_mlp.0.weight"].stored
    assert tensor.size == 2**22
    return params, path, tensor.offset


@pytest.mark.parametrize("start", [0, 1, 4095, 2**18 - 63, 2**21 - 77, 2**22 - 2**20 - 1, 2**22 - 2**20])
def test_a_stretch_that_was_not_filled(tmp_path, start):
    params, path, offset = wide_file(tmp_path)
    with path.open("r+b") as file:
        file.seek(offset + start)
        file.write(bytes(2**20))
    path.with_name("m.safetensors.part").touch()
    match = (
        r"where double_blocks\.0\.img_mlp\.0\.weight has 1 MiB of zeros: .* \(m\.safetensors\.part beside it"
    )
    with pytest.raises(InputError, match=match):
        weight_files.load(path, params)


def test_shorter_stretches_and_zeros_here_and_there_are_left_alone(tmp_path):
    params, path, offset = wide_file(tmp_path)
    with path.open("r+b") as file:
        for start in range(0, 2**22, 2**20):
            file.seek(offset + start)
            file.write(bytes(2**20 - 8192))
        for probe in range(0, 2**22, 2**18):
            file.seek(offset + probe)
            file.write(bytes(64))
    assert weight_files.load(path, params)


def test_a_matrix_of_zeros_may_be_meant(tmp_path):
    """As where a layer was taken out on purpose."""
    params, path, offset = wide_file(tmp_path)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(2**22))
    with pytest.warns(InputWarning, match=r"where double_blocks\.0\.img_mlp\.0\.weight is zeros alone"):
        assert weight_files.load(path, params)


def test_a_lora_may_have_zeros(tmp_path, weights):
    """One that was trained on the queries alone, of a fused layer."""
    up = torch.zeros(len(weights["single_blocks.0.linear1.weight"]), 2**12)
    up[:8] = 1e-3
    assert up.nbytes > 2**21
    down = torch.ones(2**12, weights["single_blocks.0.linear1.weight"].shape[1])
    file = {
        "single_blocks.0.linear1.lora_A.weight": down,
        "single_blocks.0.linear1.lora_B.weight": up,
        "z": down,
    }
    del file["z"]
    base = weight_files.save(weights, tmp_path / "m")
    file["single_blocks.1.linear1.lora_B.weight"] = torch.ones_like(up)
    file["single_blocks.1.linear1.lora_A.weight"] = down
    assert weight_files.load(base, loras=[(weight_files.save(file, tmp_path / "lora"), 1.0)])


def test_an_unfinished_download_beside_it(tmp_path):
    path = weight_files.save({"img_in.weight": torch.ones(64)}, tmp_path / "m.safetensors")
    path.with_name("m.safetensors.incomplete").touch()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"did not finish, .* \(m\.safetensors\.incomplete beside it"):
        weight_files.load(path)
    path.unlink()
    with pytest.raises(InputError, match=r"does not exist: .*incomplete beside it"):
        weight_files.load(path)
