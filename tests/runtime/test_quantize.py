"""Weights in 8 and 4 bits: how far they may be off, and that every intervention works on them."""

import pytest
import torch
from helpers import tiny_models
from torch import nn

from flux.intervention import Intervention
from flux.modules.linear import QuantizedLinear, project_rows
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import group_size, quantize_linears, quantized_bytes

# Relative to the largest number: rounding to a 254th, or to a 30th of each group's range.
BOUNDS = {8: 0.02, 4: 0.25}


def linear(rows=48, columns=96, dtype=torch.float32, bias=True) -> nn.Linear:
    return tiny_models.randomized(nn.Linear(columns, rows, bias=bias), 1).to(dtype)


def quantized(bits: int):
    model = tiny_models.flux()
    quantize_linears([model.double_blocks, model.single_blocks], bits)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_round_to_half_a_step(dtype):
    own = linear(dtype=dtype)
    packed = QuantizedLinear(own, 8)
    step = own.weight.float().abs().amax(1, keepdim=True) / 127
    error = (packed.weight.float() - own.weight.float()).abs() / step
    assert packed.weight.dtype == dtype
    assert packed.packed.dtype == torch.int8
    assert error.max() < (0.51 if dtype == torch.float32 else 1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_round_to_half_a_step(dtype):
    own = linear(columns=256, dtype=dtype)
    packed = QuantizedLinear(own, 4)
    groups = own.weight.float().view(48, 4, 64)
    step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    error = (packed.weight.float().view(48, 4, 64) - groups).abs() / step
    assert packed.weight.dtype == dtype
    assert packed.packed.nbytes == 48 * 128
    assert error.max() < (0.51 if dtype == torch.float32 else 0.7)


def test_four_bits_keep_what_sixteen_values_can_say():
    """Each group has numbers of its own: values on its grid come back as they were."""
    own = linear(rows=8, columns=256)
    grid = torch.randint(0, 16, (8, 4, 64), generator=torch.Generator().manual_seed(0)).float()
    grid[..., 0], grid[..., 1] = 0, 15
    own.weight.data = (2.0 ** torch.arange(-2, 2).view(1, 4, 1) * (grid - 5)).flatten(1)
    assert torch.equal(QuantizedLinear(own, 4).weight, own.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits):
    own = linear()
    own.weight.data[3] = 0
    weight = QuantizedLinear(own, bits).weight
    assert not weight[3].any()
    assert weight.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_expanded_weights(bits, bias):
    own, x = linear(bias=bias), torch.randn(2, 5, 96)
    packed = QuantizedLinear(own, bits)
    assert torch.equal(packed(x), nn.functional.linear(x, packed.weight, own.bias))
    torch.testing.assert_close(project_rows(packed, x, 8, 24), packed(x)[..., 8:24])


@pytest.mark.parametrize(("bits", "shape"), [(8, (48, 96)), (4, (48, 96)), (4, (7, 30))])
def test_bytes_are_as_counted(bits, shape):
    packed = QuantizedLinear(linear(*shape, dtype=torch.bfloat16, bias=False), bits)
    assert sum(x.nbytes for x in packed.buffers()) == quantized_bytes(*shape, bits, 2)


def test_group_sizes():
    assert [group_size(columns) for columns in (3072, 12288, 15360, 96, 320)] == [64, 64, 64, 16, 32]


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="5 bits"):
        QuantizedLinear(linear(), 5)


@pytest.mark.parametrize("bits", BOUNDS)
@pytest.mark.parametrize("streamed", [None, 0, 7])
def test_interventions_come_near_and_offloading_changes_nothing(bits, streamed):
    plain, given = tiny_models.flux(), tiny_models.inputs(2)
    kept = plain.observe(**tiny_models.inputs(1, seed=3), intervention=Intervention(keep=frozenset((1, 4))))[
        1
    ].kept
    for intervention in (
        Intervention(),
        Intervention(skip=frozenset((0, 5))),
        Intervention(take=dict(kept)),
    ):
        expected = plain(**given, intervention=intervention)
        model = quantized(bits)
        near = model(**given, intervention=intervention)
        assert 0 < tiny_models.relative_error(near, expected) < BOUNDS[bits]
        if streamed is not None:
            model = quantized(bits)
            net = Offloaded(model, torch.device("cpu"), [model.double_blocks, model.single_blocks], streamed)
            with net.at_work():
                assert torch.equal(model(**given, intervention=intervention), near)


def test_only_what_is_inside_is_replaced():
    model = quantized(4)
    assert type(model.img_in) is nn.Linear
    assert type(model.final_layer.linear) is nn.Linear
    kinds = {type(part) for block in model.single_blocks for part in block.modules()}
    assert nn.Linear not in kinds
    assert QuantizedLinear in kinds
