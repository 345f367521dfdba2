"""Linear layers of all kinds: how far weights are rounded, and that parts of a product equal the whole."""

import pytest
import torch
from helpers import tiny_models, weight_files
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear as product

from flux.modules.float8 import E4M3
from flux.modules.linear import (
    AnyLinear,
    Fp8Linear,
    LowRankLinear,
    PackedLinear,
    QuantizedLinear,
    can_project_rows,
    group_size,
    project_rows,
)
from flux.modules.ops import rounded

HALF_STEP = 2**-4  # of the three bits after the leading one
ROWS, COLUMNS = 32, 64
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
quick = settings(max_examples=40)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(
    rows: int = 48, columns: int = 96, dtype: torch.dtype = torch.float32, bias: bool = True
) -> nn.Linear:
    return tiny_models.randomized(nn.Linear(columns, rows, bias=bias), 1).to(dtype)


def of_kind(kind: str) -> AnyLinear:
    """A layer from COLUMNS to ROWS channels of that kind, with a bias."""
    linear = plain(ROWS, COLUMNS)
    if kind == "plain":
        return linear
    if kind in ("8 bits", "4 bits"):
        return QuantizedLinear(linear, int(kind[0]))
    if kind == "fp8":
        return Fp8Linear(linear)
    if kind.startswith("low-rank beside "):
        base = of_kind(kind.removeprefix("low-rank beside "))
        return LowRankLinear(base, random(4, COLUMNS, seed=2), random(ROWS, 4, seed=3))
    if kind == "F8_E4M3":
        packed, scale = rounded(linear.weight)
        return PackedLinear(packed.view(torch.uint8), kind, linear.bias, scale, torch.float32)
    packed = torch.from_numpy(weight_files.random_blocks(ROWS, COLUMNS, kind))
    return PackedLinear(packed, kind, linear.bias, None, torch.float32)


KINDS = ("plain", "8 bits", "4 bits", "fp8", "F8_E4M3", "Q4_0", "Q5_1")
KINDS = (*KINDS, "low-rank beside plain", "low-rank beside fp8", "low-rank beside Q4_0")


# ---- one interface


@pytest.mark.parametrize("kind", KINDS)
@given(start=st.integers(0, ROWS - 1), stop=st.integers(1, ROWS) | st.none())
@quick
def test_some_channels_equal_those_of_the_whole_product(kind, start, stop):
    linear, x = of_kind(kind), random(2, 5, COLUMNS)
    if "fp8" in kind:  # the CPU's product of 8-bit floats has a multiple of 16 channels
        start, stop = start // 16 * 16, stop and -(-stop // 16) * 16
    assume(start < (stop or ROWS))
    expected = linear(x)[..., start:stop]
    torch.testing.assert_close(project_rows(linear, x, start, stop), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_are_the_forward_bit_for_bit(kind):
    linear, x = of_kind(kind), random(2, 5, COLUMNS)
    assert torch.equal(project_rows(linear, x), linear(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fp8" not in kind])
def test_layers_compute_with_their_expanded_weights(kind):
    linear, x = of_kind(kind), random(2, 5, COLUMNS)
    bias = plain(ROWS, COLUMNS).bias
    torch.testing.assert_close(linear(x), product(x, linear.weight, bias), rtol=1e-5, atol=1e-5)


def test_compiled_code_computes_products_of_8_bit_floats_as_a_whole(monkeypatch):
    assert all(can_project_rows(of_kind(kind)) for kind in KINDS)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert {kind for kind in KINDS if not can_project_rows(of_kind(kind))} == {"fp8", "low-rank beside fp8"}


# ---- 8 and 4 bits


@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 40),
    exponent=st.integers(-3, 3),
    dtype=DTYPES,
    seed=st.integers(),
)
@quick
def test_eight_bits_round_to_half_a_step(rows, columns, exponent, dtype, seed):
    linear = nn.Linear(columns, rows).to(dtype).requires_grad_(False)
    linear.weight.copy_(random(rows, columns, seed=seed % 2**32) * 10.0**exponent)
    quantized = QuantizedLinear(linear, 8)
    largest = linear.weight.float().abs().amax(1, keepdim=True)
    assume((largest / 127 >= torch.finfo(dtype).smallest_normal).all())
    # Scale and product are rounded to the dtype, too.
    tolerance = 0.51 * largest / 127 + 2 * torch.finfo(dtype).eps * largest
    assert quantized.weight.dtype == dtype
    assert quantized.packed.dtype == torch.int8
    assert ((quantized.weight.float() - linear.weight.float()).abs() <= tolerance).all()


@given(
    rows=st.integers(1, 8),
    halves=st.integers(1, 80),
    exponent=st.integers(-3, 3),
    dtype=DTYPES,
    seed=st.integers(),
)
@quick
def test_four_bits_round_to_half_a_step_of_their_group(rows, halves, exponent, dtype, seed):
    linear = nn.Linear(2 * halves, rows).to(dtype).requires_grad_(False)
    linear.weight.copy_(random(rows, 2 * halves, seed=seed % 2**32) * 10.0**exponent)
    quantized = QuantizedLinear(linear, 4)
    groups = linear.weight.float().view(rows, -1, group_size(2 * halves))
    step = (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    assume(((step == 0) | (step >= torch.finfo(dtype).smallest_normal)).all())
    # Scale, minimum and result are rounded to the dtype, too.
    tolerance = 0.51 * step + 3 * torch.finfo(dtype).eps * groups.abs().amax(2, keepdim=True)
    assert quantized.weight.dtype == dtype
    assert quantized.packed.nbytes == rows * halves
    assert ((quantized.weight.float().view_as(groups) - groups).abs() <= tolerance).all()


@pytest.mark.parametrize(("bits", "dtype", "steps"), [
    (8, torch.float32, 0.51), (8, torch.bfloat16, 1.1), (8, torch.float16, 1.1),
    (4, torch.float32, 0.51), (4, torch.bfloat16, 0.7),
])  # fmt: skip
def test_trained_weights_round_to_about_half_a_step(bits, dtype, steps):
    linear = plain(columns=256, dtype=dtype)
    groups = linear.weight.float().view(48, 1 if bits == 8 else 4, -1)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = groups.abs().amax(2, keepdim=True) / 127 if bits == 8 else (high - low) / 15
    error = QuantizedLinear(linear, bits).weight.float().view_as(groups) - groups
    assert (error.abs() / step).max() < steps


def test_four_bits_keep_sixteen_values_exactly():
    """Each group has its own scale and minimum: values on its grid do not change."""
    linear = plain(rows=8, columns=256)
    grid = torch.randint(0, 16, (8, 4, 64), generator=torch.Generator().manual_seed(0)).float()
    grid[..., 0], grid[..., 1] = 0, 15
    linear.weight.data = (2.0 ** torch.arange(-2, 2).view(1, 4, 1) * (grid - 5)).flatten(1)
    assert torch.equal(QuantizedLinear(linear, 4).weight, linear.weight)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits):
    linear = plain()
    linear.weight.data[3] = 0
    weight = QuantizedLinear(linear, bits).weight
    assert not weight[3].any()
    assert weight.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_layer_computes_with_its_expanded_weights(bits, bias):
    linear, x = plain(bias=bias), random(2, 5, 96)
    quantized = QuantizedLinear(linear, bits)
    assert torch.equal(quantized(x), product(x, quantized.weight, linear.bias))


def test_group_sizes():
    assert [group_size(columns) for columns in (3072, 12288, 15360, 96, 320)] == [64, 64, 64, 16, 32]


@given(columns=st.integers(1, 10_000).map(lambda half: 2 * half))
def test_half_a_row_is_a_whole_number_of_groups(columns):
    assert 1 <= group_size(columns) <= 64
    assert columns // 2 % group_size(columns) == 0


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="5 bits"):
        QuantizedLinear(plain(), 5)


# ---- 8-bit floats


def test_rows_are_rounded_by_half_a_step():
    x = random(8, 256) * torch.logspace(-4, 4, 8)[:, None]
    packed, scale = rounded(x)
    error = (packed.float() * scale - x).abs()
    assert (error <= HALF_STEP * x.abs() + scale * 2**-10).all()
    assert packed.dtype == E4M3
    assert torch.equal(packed.float().abs().amax(1), torch.full((8,), 448.0))


def test_rows_of_zeros_are_rounded_to_zeros():
    packed, scale = rounded(torch.zeros(2, 16))
    assert not packed.float().any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_numbers(bias, dtype):
    linear, x = plain(dtype=dtype, bias=bias), random(2, 5, 96).to(dtype)
    layer = Fp8Linear(linear)
    packed, scale = rounded(x)
    wide = linear.bias.float() if bias else None
    expected = product(packed.float() * scale, layer.packed.float() * layer.scale, wide)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(layer(x).float(), expected, rtol=tolerance, atol=tolerance)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(project_rows(layer, x, 16, 32), layer(x)[..., 16:32])


@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.logspace(-1, 1, 48)[:, None]], ids=str)
def test_numbers_of_a_file_are_not_rounded_again(scale):
    numbers = random(48, 96).to(E4M3)
    packed = PackedLinear(numbers.view(torch.uint8), "F8_E4M3", None, scale, torch.float32)
    layer = Fp8Linear(packed)
    assert torch.equal(layer.packed.view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(layer.weight, packed.weight)
