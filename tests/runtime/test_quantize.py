"""Quantised models: what is replaced, how many bytes that takes, and that every intervention works."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import tiny_models
from torch import nn

from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Flux, Inputs
from flux.modules.linear import Fp8Linear, QuantizedLinear
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import check_fp8_support, quantize_linears, quantized_bytes, to_fp8

CPU = torch.device("cpu")
# The largest error of a velocity, relative to its largest number.
BOUNDS = {"8bit": 0.02, "4bit": 0.25, "fp8": 0.2}
QUANTIZE: dict[str, Callable[[list[nn.Module]], None]] = {
    "8bit": partial(quantize_linears, bits=8),
    "4bit": partial(quantize_linears, bits=4),
    "fp8": to_fp8,
}


def quantized(kind: str) -> Flux:
    model = tiny_models.flux()
    QUANTIZE[kind]([model.double_blocks, model.single_blocks])
    return model


def kept_kv(model: Flux, **inputs):
    return model.observe(Inputs(**inputs), intervention=Intervention(keep=frozenset((1, 4))))[1].kept


@pytest.mark.parametrize(("bits", "shape"), [(8, (48, 96)), (4, (48, 96)), (4, (7, 30))])
def test_bytes_are_as_counted(bits, shape):
    rows, columns = shape
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    quantized_linear = QuantizedLinear(linear, bits)
    assert sum(x.nbytes for x in quantized_linear.buffers()) == quantized_bytes(rows, columns, bits, 2)


@pytest.mark.parametrize("kind", QUANTIZE)
@pytest.mark.parametrize("streamed", [0, 7])
def test_interventions_come_near_and_offloading_changes_nothing(kind, streamed):
    plain, inputs = tiny_models.flux(), tiny_models.inputs(2)
    kept = kept_kv(plain, **tiny_models.inputs(1, seed=3))
    for intervention in (Intervention(), Intervention(skip=frozenset((0, 5))), Intervention(inject=kept)):
        expected = plain(**inputs, intervention=intervention)
        near = quantized(kind)(**inputs, intervention=intervention)
        assert 0 < tiny_models.relative_error(near, expected) < BOUNDS[kind]
        model = quantized(kind)
        with Offloaded(model, CPU, [model.double_blocks, model.single_blocks], streamed).on_device():
            assert torch.equal(model(**inputs, intervention=intervention), near)


@pytest.mark.parametrize("bits", [8, 4])
def test_only_blocks_are_quantised(bits):
    model = quantized(f"{bits}bit")
    assert type(model.img_in) is nn.Linear
    assert type(model.final_layer.linear) is nn.Linear
    kinds = {type(part) for block in model.single_blocks for part in block.modules()}
    assert nn.Linear not in kinds
    assert QuantizedLinear in kinds


def test_fp8_leaves_modulations_embedders_and_the_last_layer():
    model = quantized("fp8")
    plain = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    assert {name.split(".")[-2] for name in plain if "blocks." in name} == {
        "img_mod",
        "txt_mod",
        "modulation",
    }
    assert {"img_in", "txt_in", "final_layer.linear"} <= plain
    assert any(isinstance(part, Fp8Linear) for part in model.single_blocks.modules())


def test_compiled_fp8_blocks_compute_the_same():
    """Blocks are traced but not compiled. Only uncompiled code multiplies parts of the matrices."""
    inputs, model = tiny_models.inputs(2), quantized("fp8")
    with torch.no_grad():
        intervention = Intervention(inject=kept_kv(model, **inputs), inject_weights={4: 0.5})
        expected = model(**inputs, intervention=intervention)
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        assert tiny_models.relative_error(model(**inputs, intervention=intervention), expected) < 1e-6


def test_devices_without_fp8_products_are_refused():
    check_fp8_support(CPU, torch.float32)
    with pytest.raises(InputError, match='give quantize "8bit"'):
        check_fp8_support(torch.device("mps"), torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((8, 6), torch.bfloat16), ((9, 0), torch.float16)], ids=["Ampere", "float16"]
)
def test_older_gpus_and_other_dtypes_are_refused(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(InputError, match="fp8"):
        check_fp8_support(torch.device("cuda"), dtype)
