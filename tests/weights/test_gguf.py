"""GGUF: numbers bit for bit as the `gguf` package has them, and models whose weights stay packed."""

from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from helpers import tiny_models, weight_files

from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Inputs
from flux.modules.gguf_blocks import BLOCKS, expand
from flux.modules.linear import PackedLinear, project_rows
from flux.runtime.offload import Offloaded
from flux.weights.checkpoint import open_checkpoint


@pytest.mark.parametrize("kind", weight_files.KINDS)
def test_numbers_are_the_references_to_the_last_bit(kind):
    packed = weight_files.random_blocks(24, 2 * 256, kind)
    expected = reference.dequantize(packed, reference.GGMLQuantizationType[kind])
    found = expand(torch.from_numpy(packed), kind).numpy()
    assert found.dtype == np.float32
    assert found.shape == (24, 512)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", weight_files.KINDS)
def test_a_packed_model_answers_as_the_expanded_one(tmp_path, kind):
    """Each way through the blocks: plain, taking keys and values, and with a layer bypassed."""
    path = tmp_path / "model.bin"
    held = weight_files.save_gguf(weight_files.wide().state_dict(), path, kind)
    packed, plain = weight_files.load(path, weight_files.WIDE), weight_files.model_of(held, weight_files.WIDE)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 16
    given = tiny_models.inputs(2, params=weight_files.WIDE)
    assert torch.equal(packed(**given), plain(**given))
    kept = plain.observe(
        Inputs(**tiny_models.rows_of(given, [0])), intervention=Intervention(keep=frozenset({0, 1}))
    )[1].kept
    taken = Intervention(inject=kept, skip=frozenset({2}))
    assert (
        tiny_models.relative_error(packed(**given, intervention=taken), plain(**given, intervention=taken))
        < 1e-6
    )


def test_packed_weights_take_the_room_they_have_in_the_file(tmp_path):
    weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "m.gguf", "Q4_K")
    model = weight_files.load(tmp_path / "m.gguf", weight_files.WIDE, torch.bfloat16)
    linear = model.double_blocks[0].img_mlp[0]
    assert linear.packed.dtype == torch.uint8
    assert linear.packed.numel() * 8 == 512 * 256 * 4.5
    assert linear.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_unpacked_kinds_become_plain_layers(tmp_path, kind):
    held = weight_files.save_gguf(tiny_models.flux().state_dict(), tmp_path / "m.gguf", kind)
    model = weight_files.load(tmp_path / "m.gguf")
    assert all(torch.equal(x, held[name]) for name, x in model.state_dict().items())


def test_only_the_rows_that_are_asked_for():
    packed = torch.from_numpy(weight_files.random_blocks(64, 64, "Q5_1"))
    bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
    linear, x = PackedLinear(packed, "Q5_1", bias, None, torch.float32), torch.randn(3, 64)
    assert torch.allclose(project_rows(linear, x, 16, 48), linear(x)[:, 16:48], atol=1e-6)
    assert torch.equal(linear.weight, expand(packed, "Q5_1"))


def test_a_block_compiles_whole(tmp_path):
    """With its weights packed, no graph breaks, and the same numbers."""
    weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "m.gguf", "Q5_K")
    model = weight_files.load(tmp_path / "m.gguf", weight_files.WIDE)
    before = weight_files.velocity(model)
    torch._dynamo.reset()
    model.single_blocks[0].compile(fullgraph=True, backend="eager")
    assert tiny_models.relative_error(weight_files.velocity(model), before) < 1e-6


def test_packed_blocks_are_streamed(tmp_path):
    """With a low-rank difference beside some of them."""
    weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "m.gguf", "Q3_K")
    name = "single_blocks.0.linear1"
    pair = {f"{name}.lora_A.weight": torch.randn(4, 256), f"{name}.lora_B.weight": torch.randn(1280, 4)}
    loras = [(weight_files.save(pair, tmp_path / "lora"), 0.1)]
    model, device = (
        weight_files.load(tmp_path / "m.gguf", weight_files.WIDE, loras=loras),
        torch.device("cpu"),
    )
    before = weight_files.velocity(model)
    offloaded = Offloaded(model, device, [model.double_blocks, model.single_blocks], 3)
    with offloaded.on_device():
        assert torch.equal(weight_files.velocity(model), before)


# ---- files that are not right


@pytest.fixture
def file(tmp_path) -> Path:
    weight_files.save_gguf(tiny_models.flux().state_dict(), tmp_path / "m.gguf", "Q8_0")
    return tmp_path / "m.gguf"


def test_the_whole_file_is_read(file):
    weights = open_checkpoint(file).tensors
    assert weights["double_blocks.0.img_attn.qkv.weight"].kind == "Q8_0"
    reader = reference.GGUFReader(file)
    assert {tensor.name: tensor.n_bytes for tensor in reader.tensors} == {
        name: weight.stored.size for name, weight in weights.items()
    }
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: weight.stored.offset for name, weight in weights.items()
    }


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, 99, "version 99, expected 2 or 3"),
        (8, 2**60, "cut short"),  # tensors
        (16, 2**60, "broken|cut short"),  # keys
        (24, 2**63, "cut short"),  # length of the first key's name
    ],
)
def test_absurd_lengths(file, offset, value, message):
    data = bytearray(file.read_bytes())
    size = 4 if offset == 4 else 8
    data[offset : offset + size] = value.to_bytes(size, "little")
    file.write_bytes(data)
    with pytest.raises(InputError, match=message):
        open_checkpoint(file)


def test_cut_short(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    with pytest.raises(InputError, match=r"did not finish"):
        open_checkpoint(file)
    file.write_bytes(data[:400])
    with pytest.raises(InputError, match="cut short"):
        open_checkpoint(file)


def test_kinds_that_are_not_known_are_named(tmp_path):
    writer = reference.GGUFWriter(tmp_path / "m.gguf", "flux")
    kind = reference.GGMLQuantizationType.IQ4_XS
    writer.add_tensor("img_in.weight", np.zeros((4, 136), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"'img_in.weight' is of GGUF kind 23, which is not supported"):
        open_checkpoint(tmp_path / "m.gguf")


def test_blocks_have_the_references_sizes():
    for kind, sizes in BLOCKS.items():
        assert reference.GGML_QUANT_SIZES[reference.GGMLQuantizationType[kind]] == sizes
