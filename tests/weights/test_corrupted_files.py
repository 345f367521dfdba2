"""A thousand broken files, the same each time: refused in one line, or harmless, with the model the same.

Never another error, never a hang, never more memory than such a small file can need.
"""

import json
import random
import re
import resource
import shutil
import signal
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny_models, weight_files
from PIL import Image

from flux.errors import InputError, exit_on_input_error
from flux.files import write_json
from flux.images.io import read_image
from flux.model import Flux
from flux.settings import GenerateSettings, read_settings
from flux.specs import NANO_FOLDER, configs
from flux.weights.hub import TEXT_FOLDERS
from flux.weights.open_model import ModelFiles, OpenModel

PARAMS = replace(tiny_models.PARAMS, depth=1, depth_single_blocks=1)
ROOM = 2**30  # bytes above what the process has
SECONDS = 10  # for one file
LENGTHS = (0, 1, 7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.fixture(autouse=True)
def bounds():
    """An absurd allocation fails here, where Linux would promise it and kill the process later."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))

    def hang(*_):
        raise TimeoutError("a broken file takes too long")

    handler = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def model():
    return tiny_models.randomized(Flux(PARAMS), 0)


def write_safetensors(model: Flux, folder: Path) -> Path:
    return weight_files.save(model.state_dict(), folder / "m.safetensors", about="random")


def write_scaled(model: Flux, folder: Path) -> Path:
    return weight_files.save(weight_files.scaled_fp8(model.state_dict())[0], folder / "m.safetensors")


def write_gguf(model: Flux, folder: Path) -> Path:
    weight_files.save_gguf(model.state_dict(), folder / "m.gguf", "Q8_0")
    return folder / "m.gguf"


def write_index(model: Flux, folder: Path) -> Path:
    tiny_models.diffusers_transformer(model).save_pretrained(folder, max_shard_size="40KB")
    [index] = folder.glob("*.index.json")
    return index


def head_of(data: bytes) -> int:
    """Bytes of the file's head: what is behind it are numbers, of which any are valid."""
    if data.startswith(b"GGUF"):
        return data.rindex(b"final_layer") + 60
    return len(data) if data.startswith(b"{") else 8 + struct.unpack("<Q", data[:8])[0]


def corrupted(data: bytes, dice: random.Random) -> bytes:
    """Cut anywhere, with bits of the head flipped, or with an absurd length, in its place or elsewhere."""
    head, kind = head_of(data), dice.randrange(5)
    changed = bytearray(data)
    if kind == 0:
        return data[: dice.randrange(len(data))]
    if kind == 1:
        return data[: dice.randrange(head)]
    if kind == 2:
        for _ in range(dice.choice((1, 1, 2, 8))):
            changed[dice.randrange(head)] ^= 1 << dice.randrange(8)
    elif kind == 3:
        length = struct.pack("<Q", dice.choice(LENGTHS))
        at = dice.choice((0, 8, 16, 24, dice.randrange(head - 8)))
        changed[at : at + 8] = length
    else:
        at = dice.choice([i for i in range(head) if chr(data[i]).isdigit()])
        number = f"{dice.choice(LENGTHS)}{'0' * dice.choice((0, 0, 30, 5000))}".encode()
        changed[at : at + 1] = number
        if not data.startswith((b"GGUF", b"{")):  # the head's length stands before it
            changed[:8] = struct.pack("<Q", head - 8 + len(number) - 1)
    return bytes(changed)


def outcome(load) -> str | object:
    """The model, or the one line that says why not."""
    signal.alarm(SECONDS)
    try:
        return load()
    except InputError as error:
        message = str(error)
    finally:
        signal.alarm(0)
    assert "\n" not in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("write", "count"),
    [(write_safetensors, 260), (write_scaled, 260), (write_gguf, 260), (write_index, 120)],
)
def test_a_damaged_transformer_is_refused_or_the_same(tmp_path, model, write, count):
    path = write(model, tmp_path)
    place = path.parent if path.suffix == ".json" else path
    good, expected = path.read_bytes(), weight_files.load(place, PARAMS).state_dict()
    refused = 0
    for seed in range(count):
        path.write_bytes(corrupted(good, random.Random(seed)))
        found = outcome(lambda: weight_files.load(place, PARAMS))
        if isinstance(found, str):
            refused += 1
            continue
        state = found.state_dict()
        same = all(name in state and torch.equal(state[name], x) for name, x in expected.items())
        assert same, f"seed {seed} was loaded as something else"
        assert state.keys() == expected.keys()
    assert refused > 0.8 * count


def test_a_damaged_lora_is_refused_or_the_same(tmp_path, model):
    """Read with its header's JSON and the scales of one of its pairs."""
    base = write_safetensors(model, tmp_path)
    about = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})
    file = {
        f"transformer.single_transformer_blocks.0.attn.to_{x}.lora_A.weight": torch.randn(4, 32)
        for x in "qkv"
    }
    file |= {name.replace("lora_A", "lora_B"): torch.randn(32, 4) for name in file}
    path = weight_files.save(file, tmp_path / "lora.safetensors", lora_adapter_metadata=about)
    good = path.read_bytes()
    begin = good.index(b"lora_adapter_metadata") + len(about) + 40
    for seed in range(60):
        dice = random.Random(seed)
        changed = bytearray(corrupted(good, dice))
        # The alpha itself may become another number, which nothing can tell.
        changed[:begin] = good[:begin]
        path.write_bytes(bytes(changed))
        outcome(lambda: weight_files.load(base, PARAMS, loras=[(path, 1.0)]))


def test_a_damaged_encoder_is_refused(tmp_path):
    """A T5 whose config.json is cut short anywhere."""
    shutil.copytree(NANO_FOLDER / "text_encoder_2", tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    good = config.read_bytes()
    for seed in range(40):
        config.write_bytes(good[: random.Random(seed).randrange(len(good) - 3)])
        files = ModelFiles(tmp_path, tmp_path, NANO_FOLDER, t5=tmp_path / "t5")
        load = OpenModel(configs["flux-nano"], files).load_text_encoder
        assert isinstance(outcome(partial(load, "text_encoder_2", "cpu", torch.float32)), str)


@pytest.mark.parametrize("name", ["m.pt", "m.bin", "m.ckpt", "m.safetensors", "m.gguf"])
def test_no_pickle_is_ever_loaded(tmp_path, name):
    """Whatever its name: one that would write a file when it is loaded does not."""
    import pickle

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"img_in.weight": Trap()}, tmp_path / name)
    for bare in (False, True):
        if bare:
            (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        message = outcome(lambda: weight_files.load(tmp_path / name))
        assert "a pickle, never loaded since it may run code" in message
        folder = outcome(lambda: weight_files.load(tmp_path))
        assert isinstance(folder, str)
    assert not (tmp_path / "sprung").exists()


# ---- whole programs: a thousand broken files of every kind, a thousand single lines


def in_random_places(data: bytes, dice: random.Random) -> bytes:
    """Cut anywhere, emptied, full of zeros, a web page instead, or a brace or quote too many."""
    at = dice.randrange(len(data) * 9 // 10)
    return dice.choice(
        (data[:at], b"", bytes(len(data)), b"<html>404</html>", weight_files.LFS_POINTER, b"\xff\xfe" + data)
    )


def broken_header(data: bytes, dice: random.Random) -> bytes:
    """Another dtype, length, shape or name in a safetensors header, always one that cannot be right."""
    head = head_of(data)
    changed = bytearray(data)
    kind = dice.randrange(4)
    if kind == 0:
        changed[:8] = struct.pack("<Q", dice.choice(LENGTHS))
    elif kind == 1:
        at = dice.choice([match.start() for match in re.finditer(b'"F16"|"F32"|"BF16"', data[:head])])
        changed[at + 1 : at + 4] = dice.choice((b"F99", b"I64", b"\x00\x00\x00"))
    elif kind == 2:
        at = dice.choice([match.end() for match in re.finditer(b'"shape":\\[(?=\\d)', data[:head])])
        changed[at] = ord(dice.choice("-xe]"))
    else:
        return data[: dice.randrange(len(data) - 1)]
    return bytes(changed)


@pytest.fixture
def whole(tmp_path):
    """flux-nano's files, an image and a settings file, in a folder of their own."""
    for name in TEXT_FOLDERS:
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    for name in ("ae.safetensors", "transformer.safetensors"):
        (tmp_path / name).write_bytes((NANO_FOLDER / name).read_bytes())
    Image.effect_noise((64, 64), 50).save(tmp_path / "image.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "image.jpg")
    write_json(tmp_path / "settings.json", {"model": "flux-nano", "prompts": ["a dog"], "seed": 1})
    return tmp_path


DAMAGE = {
    "transformer.safetensors": broken_header,
    "ae.safetensors": broken_header,
    "text_encoder/model.safetensors": broken_header,
    "text_encoder_2/model.safetensors": broken_header,
    "tokenizer/tokenizer.json": in_random_places,
    "tokenizer_2/tokenizer.json": in_random_places,
    "text_encoder_2/config.json": in_random_places,
    "image.png": in_random_places,
    "image.jpg": in_random_places,
    "settings.json": in_random_places,
}


def open_all(folder: Path, name: str) -> None:
    """Read the file of that name as a demo does."""
    if name.startswith("image"):
        read_image(folder / name)
    elif name.startswith("settings"):
        read_settings(GenerateSettings, folder / name)
    else:
        flow, ae = folder / "transformer.safetensors", folder / "ae.safetensors"
        OpenModel(configs["flux-nano"], ModelFiles(flow, ae, folder)).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_a_hundred_of_each_end_in_one_line(whole, name, capsys):
    good = (whole / name).read_bytes()
    open_all(whole, name)
    for seed in range(100):
        (whole / name).write_bytes(DAMAGE[name](good, random.Random(seed)))
        signal.alarm(SECONDS)
        with pytest.raises(SystemExit) as end, exit_on_input_error():
            open_all(whole, name)
        signal.alarm(0)
        assert end.value.code == 2, seed
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), seed
