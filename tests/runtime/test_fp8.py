"""Products in 8-bit floats: how far they may be off, what stays as it is, and that interventions work."""

import pytest
import torch
from helpers import tiny_models
from torch import nn
from torch.nn.functional import linear as product

from flux.errors import InputError
from flux.intervention import Intervention
from flux.modules.linear import Fp8Linear, PackedLinear, project_rows
from flux.modules.ops import E4M3, rounded
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import check_device, to_fp8

HALF_STEP = 2**-4  # of three bits behind the first


def fp8_model():
    model = tiny_models.flux()
    to_fp8([model.double_blocks, model.single_blocks])
    return model


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rows_are_rounded_by_half_a_step():
    x = random(8, 256) * torch.logspace(-4, 4, 8)[:, None]
    own, scale = rounded(x)
    error = (own.float() * scale - x).abs()
    assert (error <= HALF_STEP * x.abs() + scale * 2**-10).all()
    assert own.dtype == E4M3
    assert torch.equal(own.float().abs().amax(1), torch.full((8,), 448.0))


def test_rows_of_zeros_stay_zeros():
    own, scale = rounded(torch.zeros(2, 16))
    assert not own.float().any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_numbers(bias, dtype):
    own, x = tiny_models.randomized(nn.Linear(96, 48, bias=bias), 1).to(dtype), random(2, 5, 96).to(dtype)
    layer = Fp8Linear(own)
    q, scale = rounded(x)
    wide = None if own.bias is None else own.bias.float()
    expected = product(q.float() * scale, layer.packed.float() * layer.scale, wide)
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


@pytest.mark.parametrize("streamed", [0, 7])
def test_interventions_come_near_and_offloading_changes_nothing(streamed):
    plain, given = tiny_models.flux(), tiny_models.inputs(2)
    kept = plain.observe(**tiny_models.inputs(1, seed=3), intervention=Intervention(keep=frozenset((1, 4))))[
        1
    ].kept
    for intervention in (Intervention(), Intervention(skip=frozenset((0, 5))), Intervention(take=dict(kept))):
        expected = plain(**given, intervention=intervention)
        near = fp8_model()(**given, intervention=intervention)
        assert 0 < tiny_models.relative_error(near, expected) < 0.2
        model = fp8_model()
        net = Offloaded(model, torch.device("cpu"), [model.double_blocks, model.single_blocks], streamed)
        with net.at_work():
            assert torch.equal(model(**given, intervention=intervention), near)


def test_compiled_it_says_the_same():
    """Traced and not translated, which takes a C compiler's time; taking over uses parts of the matrices only
    where it is not.
    """
    given, model = tiny_models.inputs(2), fp8_model()
    with torch.no_grad():
        kept = model.observe(**given, intervention=Intervention(keep=frozenset((1, 4))))[1].kept
        taking = Intervention(take=kept, weights={4: 0.5})
        expected = model(**given, intervention=taking)
        for block in (*model.double_blocks, *model.single_blocks):
            block.compile(fullgraph=True, backend="eager")
        assert tiny_models.relative_error(model(**given, intervention=taking), expected) < 1e-6


def test_modulations_embedders_and_last_layer_stay_wide():
    model = fp8_model()
    wide = {name for name, part in model.named_modules() if type(part) is nn.Linear}
    assert {name.split(".")[-2] for name in wide if "blocks." in name} == {"img_mod", "txt_mod", "modulation"}
    assert {"img_in", "txt_in", "final_layer.linear"} <= wide


def test_where_it_cannot_be_had_it_is_refused():
    check_device(torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match='give quantize "8bit"'):
        check_device(torch.device("mps"), torch.bfloat16)


def test_older_cards_and_other_dtypes_are_refused(monkeypatch):
    for capability, dtype in (((8, 6), torch.bfloat16), ((9, 0), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with pytest.raises(InputError, match="fp8"):
            check_device(torch.device("cuda"), dtype)
