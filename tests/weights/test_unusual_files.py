"""Transformer files that are unusual: read if they can be, else named for what they are."""

import json

import pytest
import torch
from helpers import weight_files

from flux.errors import InputError
from flux.weights.layouts import CLIP_UNUSED, T5_GGUF_UNUSED


def test_norms_called_weight(tmp_path, source, weights):
    """As ComfyUI writes them."""
    renamed = {name.replace("_norm.scale", "_norm.weight"): x for name, x in weights.items()}
    assert renamed.keys() != weights.keys()
    assert weight_files.same(weight_files.load(weight_files.save(renamed, tmp_path / "m")), source)


def in_shards(weights, folder, count=3):
    names, paths = sorted(weights), []
    for i in range(count):
        path = folder / f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        paths.append(weight_files.save({name: weights[name] for name in names[i::count]}, path))
    return paths


def test_shards_without_an_index(tmp_path, source, weights):
    """The folder, or any one of them."""
    paths = in_shards(weights, tmp_path)
    for place in (tmp_path, paths[0], paths[2]):
        assert weight_files.same(weight_files.load(place), source)


def test_a_missing_shard_is_named(tmp_path, weights):
    paths = in_shards(weights, tmp_path)
    paths[1].unlink()
    for place in (tmp_path, paths[2]):
        with pytest.raises(InputError, match=r"one of 3 shards, where \S+-00002-of-00003\S+ is missing"):
            weight_files.load(place)


def test_a_pruned_model(tmp_path, weights):
    few = {name: x for name, x in weights.items() if not name.startswith("double_blocks.2.")}
    with pytest.raises(InputError, match=r"has 2 of 3 double blocks: it is a pruned model"):
        weight_files.load(weight_files.save(few, tmp_path / "m"))


def test_no_guidance_input_has_two_causes(tmp_path, weights):
    few = {name: x for name, x in weights.items() if "guidance_in" not in name}
    with pytest.raises(InputError, match=r"a schnell file, .* or a de-distilled dev, load it as flux-dev-de"):
        weight_files.load(weight_files.save(few, tmp_path / "m"))


QKV = "double_blocks.0.img_attn.qkv"
WHOLE_NUMBERS = torch.arange(-96 * 16, 96 * 16).view(96, 32).remainder(255).sub(127).to(torch.int8)


@pytest.mark.parametrize("shape", [(96, 1), (96,), ()])
def test_whole_numbers_with_scales(tmp_path, weights, shape):
    scale = torch.rand(shape) + 0.5
    file = {**weights, f"{QKV}.weight": WHOLE_NUMBERS, f"{QKV}.weight_scale": scale}
    model = weight_files.load(weight_files.save(file, tmp_path / "m"))
    assert torch.equal(model.double_blocks[0].img_attn.qkv.weight, WHOLE_NUMBERS.float() * scale.view(-1, 1))


@pytest.mark.parametrize(
    "beside", [{}, {f"{QKV}.weight_scale": torch.ones(32)}, {f"{QKV}.weight_scale": WHOLE_NUMBERS[:, :1]}]
)
def test_whole_numbers_without_fitting_scales(tmp_path, weights, beside):
    file = {**weights, f"{QKV}.weight": WHOLE_NUMBERS, **beside}
    with pytest.raises(InputError, match=r"8-bit whole numbers without a scale for each row: not supported"):
        weight_files.load(weight_files.save(file, tmp_path / "m"))


def test_whole_numbers_of_a_declared_format(tmp_path, weights):
    about = json.dumps({"layers": {QKV: {"format": "int8_tensorwise"}}})
    file = {**weights, f"{QKV}.weight": WHOLE_NUMBERS, f"{QKV}.weight_scale": torch.ones(96, 1)}
    with pytest.raises(InputError, match=r"quantised as 'int8_tensorwise': not supported"):
        weight_files.load(weight_files.save(file, tmp_path / "m", _quantization_metadata=about))


@pytest.mark.parametrize(("ending", "title"), [("SCB", "bitsandbytes 8-bit"), ("weight_scale_2", "nvfp4")])
def test_other_quantisations(tmp_path, weights, ending, title):
    file = {**weights, f"img_in.{ending}": torch.ones(1), "img_in.weight": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(InputError, match=f"which is {title}: not supported"):
        weight_files.load(weight_files.save(file, tmp_path / "m"))


def test_files_of_mlx_are_told(tmp_path):
    tensor = {"dtype": "U32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"transformer_blocks.0.attn.to_q.weight": tensor}).encode()
    path = tmp_path / "mlx.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(InputError, match=r"'U32', .* Apple's MLX: take a GGUF"):
        weight_files.load(path)


@pytest.mark.parametrize("name", ["visual_projection.weight", "text_projection.weight", "vision_model.x"])
def test_parts_of_a_whole_clip_are_not_needed(name):
    import re

    assert re.fullmatch(CLIP_UNUSED, name)


@pytest.mark.parametrize("name", ["dec.blk.0.attn_q.weight", "output.weight"])
def test_the_decoder_of_a_whole_t5_is_not_needed(name):
    import re

    assert re.fullmatch(T5_GGUF_UNUSED, name)
