"""Quantised weights: 8-bit floats with and without scales, and formats that are refused."""

import json

import pytest
import torch
from helpers import tiny_models, weight_files

from flux.errors import InputError
from flux.modules.linear import PackedLinear
from flux.specs import NANO_FOLDER


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_scaled_8_bit_floats(tmp_path, weights, ending, per_row, keep):
    file, meant = weight_files.scaled_fp8(weights, ending, per_row)
    file["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    for name in list(file):
        if name.endswith(ending):
            file[
                name.replace(
                    ending, {".scale_weight": ".scale_input", ".weight_scale": ".input_scale"}[ending]
                )
            ] = torch.ones(())
    path = weight_files.save(
        weight_files.with_prefix(file, "model.diffusion_model."), tmp_path / "m.safetensors"
    )
    model = weight_files.load(path, keep_8bit=keep)
    assert isinstance(model.img_in, PackedLinear) == keep
    assert weight_files.same(model, weight_files.model_of(meant))


@pytest.mark.parametrize("where", ["header", "tensors"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4"])
def test_what_newer_8_bit_files_say_of_themselves(tmp_path, weights, where, kind):
    file, meant = weight_files.scaled_fp8(weights, ".weight_scale")
    metadata = {}
    if where == "header":
        layers = {"img_in": {"format": kind}}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        text = json.dumps({"format": kind}).encode()
        file["img_in.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = weight_files.save(file, tmp_path / "m.safetensors", **metadata)
    if kind == "nvfp4":
        with pytest.raises(InputError, match="img_in is quantised as 'nvfp4': not supported"):
            weight_files.load(path)
    else:
        assert weight_files.same(weight_files.load(path), weight_files.model_of(meant))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("img_in.weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        ("single_blocks.0.linear1.wscales", "Nunchaku"),
        ("img_in.weight._data", "quanto"),
    ],
)
def test_forms_that_are_not_supported_are_named(tmp_path, weights, name, what):
    path = weight_files.save({**weights, name: torch.zeros(4, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=what):
        weight_files.load(path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_8_bit_floats(load, weights, kind):
    """Files with everything cast and no scales: the cast is undone, nothing else."""
    model = load({name: x.to(kind) for name, x in weights.items()})
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name].to(kind).float())


@pytest.mark.parametrize("marker", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_are_multiplied_in(load, weights, shape, marker):
    """Matrices times the scale that stands beside them, multiplied before they are rounded to the model's
    dtype; without it the model would load and make noise. Scales of activations and the marker are of no use
    here.
    """
    file, expected = {"scaled_fp8": torch.empty(marker, dtype=torch.float8_e4m3fn)}, {}
    for name, x in weights.items():
        file[name], expected[name] = x, x
        if name.endswith(".weight"):
            scale = x.abs().max() / 448
            file[name] = (x / scale).to(torch.float8_e4m3fn)
            file[name.replace(".weight", ".scale_weight")] = scale.reshape(shape)
            file[name.replace(".weight", ".scale_input")] = torch.ones(shape)
            expected[name] = file[name].float() * scale
    model = load(file)
    for name, x in model.state_dict().items():
        assert torch.equal(x, expected[name]), name
    for name, x in load(file, dtype=torch.bfloat16).state_dict().items():
        assert torch.equal(x, expected[name].bfloat16()), name


@pytest.mark.parametrize("leftover", ["img_in.weight_scale", "img_in.comfy_quant"])
def test_scales_of_other_forms_are_refused(load, weights, leftover):
    """Loaded as plain weights such a file makes noise without any error."""
    with pytest.raises(InputError, match=leftover):
        load({**weights, leftover: torch.ones(1)})


def test_the_small_models_own_file_reads_as_its_scales_say(nano):
    from safetensors.torch import load_file

    plain = tiny_models.unscaled(load_file(NANO_FOLDER / "transformer.safetensors"))
    for name, x in nano.model.state_dict().items():
        assert torch.equal(x, plain[name]), name
