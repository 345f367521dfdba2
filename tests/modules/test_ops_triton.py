"""The Triton kernels, run by Triton's interpreter, beside plain PyTorch. On a GPU: inside the model."""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_models

from flux.intervention import Intervention
from flux.math import apply_rope
from flux.model import Inputs
from flux.modules import ops
from flux.modules.layers import EmbedND
from flux.modules.norms import QKNorm, layer_norm
from flux.modules.ops import E4M3, Rounded
from flux.modules.projections import split_heads
from flux.runtime.quantize import to_fp8


@pytest.fixture(scope="module")
def kernels():
    """The kernels, run as Python code.

    The interpreter rounds to e4m3 wrongly (what it rounds up to a power of two becomes half of that), so here
    they scale, and torch rounds.
    """
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU: test_on_a_gpu runs the kernels here")
    pytest.importorskip("triton", reason="Triton is made for Linux alone")
    from flux.modules import ops_triton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_triton, "E4M3", torch.float32)
        yield ops_triton


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the last bit or two of their dtype."""
    tolerance = 2 * torch.finfo(found.dtype).eps
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def scaled(found: tuple[torch.Tensor, torch.Tensor], expected: torch.Tensor) -> None:
    """Every row fills e4m3's range, and times its scale is what is expected."""
    packed, scale = found
    assert scale.shape == (*expected.shape[:-1], 1)
    torch.testing.assert_close(packed.abs().amax(-1, keepdim=True), torch.full_like(scale, 448.0))
    same(packed * scale, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "rows"), [(3, 1), (8, 2), (11, 2)])
def test_qk_norm_rope(kernels, heads, rows, dtype):
    """Queries and keys of one projection, whatever the number of heads; one rotation for all rows or one for
    each.
    """
    q, k, v = (split_heads(x, heads) for x in random(2, 5, 3 * heads * 16, dtype=dtype).chunk(3, dim=-1))
    norm = QKNorm(16).to(dtype).requires_grad_(False)
    for part in (norm.query_norm, norm.key_norm):
        part.scale.copy_(random(16) + part.eps)
    pe = EmbedND(16, 10000, [4, 6, 6])(3 * random(rows, 5, 3))
    found = kernels.qk_norm_rope(q, k, norm.query_norm.scale, norm.key_norm.scale, norm.query_norm.eps, pe)
    for x, expected in zip(found, apply_rope(*norm(q, k, v), pe)):
        assert x.dtype == dtype
        same(x, expected)
    for part, x, both in ((norm.query_norm, q, found[0]), (norm.key_norm, k, found[1])):
        assert torch.equal(kernels.norm_rope(x, part.scale, part.eps, pe), both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mods", [1, 2])
def test_norm_modulate(kernels, mods, dtype):
    """Shift and scale of each row of the batch or one for all, as parts of one projection."""
    x, norm = random(2, 5, 24, dtype=dtype), layer_norm(24)
    shift, scale, _ = random(mods, 72, dtype=dtype).unsqueeze(1).chunk(3, dim=-1)
    expected = (1 + scale.float()) * norm(x.float()) + shift.float()
    same(kernels.norm_modulate(x, shift, scale, norm.eps, False)[0], expected)
    scaled(kernels.norm_modulate(x, shift, scale, norm.eps, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mixed", "hidden"), [(True, True), (False, True), (True, False)])
def test_concat_gelu(kernels, mixed, hidden, dtype):
    """The MLP's part lies beside queries, keys and values."""
    mixed = random(2, 3, 12, dtype=dtype) if mixed else None
    hidden = 2 * random(2, 3, 60, dtype=dtype)[..., 12:] if hidden else None
    parts = [] if mixed is None else [mixed.float()]
    parts += [] if hidden is None else [F.gelu(hidden.float(), approximate="tanh")]
    expected = torch.cat(parts, dim=-1)
    same(kernels.concat_gelu(mixed, hidden, False)[0], expected)
    scaled(kernels.concat_gelu(mixed, hidden, True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_tokens(kernels, dtype):
    """One row stands for both; the copies go beside something else, which stays."""
    x, places = random(1, 7, 24, dtype=dtype).expand(2, -1, -1), torch.tensor([0, 3, 6])
    wide = torch.zeros(2, 5, 48, dtype=dtype)
    kernels.copy_tokens(x, places, wide[:, 2:, 24:])
    assert torch.equal(wide[:, 2:, 24:], x[:, places])
    assert not wide[:, :2].any()
    assert not wide[..., :24].any()


def test_rows_of_zeros_stay_zeros(kernels):
    packed, scale = kernels.concat_gelu(torch.zeros(1, 2, 16), None, True)
    assert not packed.float().any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_model_with_kernels_says_the_same(kernels, monkeypatch, eight_bit):
    """Keeping, rows that skip, and injecting with a weight in one layer and wholly in the other: every way a
    block calls them.
    """
    small = {"height": 32, "width": 32, "num_txt": 3}
    model, given = tiny_models.flux(), tiny_models.inputs(2, **small)
    layers, other = frozenset((1, 4)), tiny_models.inputs(1, seed=3, **small)
    kept = model.observe(Inputs(**other), intervention=Intervention(keep=layers))[1].kept
    kept = {layer: tuple(x.detach() for x in pair) for layer, pair in kept.items()}
    every = [Intervention(keep=layers, skip=(frozenset((0,)), frozenset((5,))))]
    every += [Intervention(inject=kept, inject_weights={layer: 0.5}) for layer in layers]
    if eight_bit:
        to_fp8([model.double_blocks, model.single_blocks])

    def rounding(kernel):
        def made(*given):
            result, scale = kernel(*given)
            return (result.to(E4M3) if given[-1] else result), scale

        return made

    with torch.no_grad():
        expected = [model(**given, intervention=one) for one in every]
        monkeypatch.setattr(ops, "ops_triton", kernels)
        monkeypatch.setattr(ops, "has_kernel", lambda x: True)
        for name in ("norm_modulate", "concat_gelu"):
            monkeypatch.setattr(kernels, name, rounding(getattr(kernels, name)))
        found = [model(**given, intervention=one) for one in every]
    for one, other in zip(found, expected):
        assert tiny_models.relative_error(one, other) < (0.01 if eight_bit else 1e-6)


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_too_old_for_triton_have_no_kernel(monkeypatch, capability, expected):
    there = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(ops, "ops_triton", ops)
    monkeypatch.setattr(ops, "gpu_capability", lambda: capability)
    with torch.no_grad():
        assert ops.has_kernel(there) is expected
        assert not ops.has_kernel(types.SimpleNamespace(is_cuda=False))
    with torch.enable_grad():
        assert not ops.has_kernel(there)


def test_the_compiler_treats_the_gpu_check_as_a_constant():
    """A mark that torch's compiler reads."""
    tiny_models.flux().compile_blocks()
    assert ops.gpu_runs_triton._dynamo_marked_constant


def test_what_is_rounded_can_be_cut():
    x = random(2, 5, 8)
    whole, part = Rounded.of(x), Rounded.of(x)[:, :2]
    assert part.shape == (2, 2, 8)
    assert torch.equal(part.scale, whole.scale[:, :2])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_on_a_gpu(monkeypatch, compiled, eight_bit):
    """In bfloat16, as near to float32 as plain PyTorch, for one image and for two."""
    cuda = torch.device("cuda")
    for batch in (1, 2):
        given = {name: x.to(cuda) for name, x in tiny_models.inputs(batch).items() if x is not None}
        narrow = {
            n: x.bfloat16() if x.is_floating_point() and "ids" not in n else x for n, x in given.items()
        }
        errors = []
        for enabled in (True, False):
            model = tiny_models.flux().to(cuda)
            with torch.no_grad():
                expected = model(**given)
                model.bfloat16()
                if eight_bit:
                    to_fp8([model.double_blocks, model.single_blocks])
                if compiled:
                    model.compile_blocks()
                with monkeypatch.context() as patch:
                    if not enabled:
                        patch.setattr(ops, "ops_triton", None)
                    errors.append(tiny_models.relative_error(model(**narrow).float(), expected))
        assert errors[0] <= 1.2 * errors[1]
