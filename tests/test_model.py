"""The transformer equals diffusers' and the published file's names and shapes; its blocks compile once
each.
"""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from helpers import tiny_models
from torch.testing import assert_close

from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Flux, FluxParams, Inputs
from flux.modules.layers import Block, EmbedND, SelfAttention, timestep_embedding
from flux.modules.norms import RMSNorm
from flux.runtime.offload import Offloaded
from flux.specs import configs

MANIFESTS = Path(__file__).parent / "manifests"


@pytest.mark.parametrize("guidance_embed", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("num_txt", [1, 5, 12])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 128)], ids=str)
def test_equals_diffusers(size, num_txt, guidance_embed):
    """Another order of modulation parts, of q, k, v, of text and image, or of rotary axes would show here."""
    model = tiny_models.flux(guidance_embed=guidance_embed)
    given = tiny_models.inputs(2, *size, num_txt=num_txt, params=model.params)
    error = tiny_models.relative_error(
        model(**given), tiny_models.ask_diffusers(tiny_models.diffusers_transformer(model), given)
    )
    assert error < 1e-6, f"relative error {error:.1e}"


def test_every_parameter_matters():
    """The comparison above could miss a part that takes no part: moving any tensor must move the answer."""
    model, given = tiny_models.flux(), tiny_models.inputs(1)
    plain = model(**given)
    for name, parameter in model.named_parameters():
        own = parameter.data.clone()
        parameter.data += 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
        moved = not torch.equal(model(**given), plain)
        parameter.data = own
        assert moved, f"{name} does not matter"


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_equals_the_forward_by_hand(guidance_embed):
    """The hand-written pass is the oracle of the injection's tests; this anchors it."""
    model = tiny_models.flux(guidance_embed=guidance_embed)
    given = tiny_models.inputs(2, 48, 80, params=model.params)
    error = tiny_models.relative_error(tiny_models.hand_forward(model, given), model(**given))
    assert error < 1e-6, f"relative error {error:.1e}"


def test_rows_do_not_see_each_other():
    model, given = tiny_models.flux(), tiny_models.inputs(3)
    whole = model(**given)
    for row in range(3):
        assert_close(whole[row : row + 1], model(**tiny_models.rows_of(given, [row])), rtol=0, atol=5e-6)


def test_text_positions_do_not_matter_but_image_positions_do():
    model, given = tiny_models.flux(), tiny_models.inputs(1, 48, 80)
    swapped = {**given, "img_ids": given["img_ids"][..., [0, 2, 1]]}
    assert not torch.allclose(model(**given), model(**swapped), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_timestep_embedding_equals_diffusers(dtype):
    t = torch.tensor([0.0, 0.1234, 0.5, 1.0, 3.5]).to(dtype)
    expected = get_timestep_embedding(1000 * t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert_close(timestep_embedding(t, 256), expected.to(dtype), rtol=0, atol=0)


def test_bfloat16_stays_close():
    """Noise levels and guidance whose thousandfold bfloat16 can hold: then only rounding is left, 2.1 %
    here.
    """
    model, given = tiny_models.flux(), tiny_models.inputs(2)
    given |= {"timesteps": torch.tensor([0.25, 0.5]), "guidance": torch.tensor([2.0, 4.0])}
    wide = model(**given)
    narrow = model.bfloat16()(**{k: x if k.endswith("ids") else x.bfloat16() for k, x in given.items()})
    assert narrow.dtype == torch.bfloat16
    error = (narrow - wide).norm() / wide.norm()
    assert error < 0.04, f"relative L2 {error:.3f}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_queries_and_keys_are_computed_wide(dtype):
    """Squares of a few hundred overflow float16, and bfloat16 cannot add many of them up."""
    norm = tiny_models.randomized(RMSNorm(128), 0).to(dtype)
    x = (300 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = tiny_models.hand_rms(x.double(), norm.scale.double())
    assert_close(norm(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_parts_of_upstream_that_the_model_does_not_call():
    """`SelfAttention.forward` alone: the stream attends to itself."""
    attn = tiny_models.randomized(SelfAttention(32, 2, qkv_bias=True), 0)
    x = torch.randn(1, 6, 32)
    pe = EmbedND(16, 10_000, [4, 6, 6])(tiny_models.inputs(1, 32, 48)["img_ids"])
    assert pe.shape == (1, 1, 6, 8, 2, 2)
    assert attn(x, pe).shape == x.shape


@pytest.mark.parametrize("name", ["flux-dev", "flux-dev-krea", "flux-schnell"])
def test_full_size_has_the_names_and_shapes_of_the_published_file(name):
    expected = json.loads((MANIFESTS / "flux1-dev.json").read_text())
    if name == "flux-schnell":
        expected = {key: shape for key, shape in expected.items() if not key.startswith("guidance_in.")}
    with torch.device("meta"):
        model = Flux(configs[name].params)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == expected
    assert model.num_layers == 57


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        tiny_models.flux(num_heads=3)
    with pytest.raises(ValueError, match="axes"):
        tiny_models.flux(axes_dim=[4, 4, 4])


def test_wrong_inputs_are_refused():
    model, given = tiny_models.flux(), tiny_models.inputs(1)
    with pytest.raises(ValueError, match="guidance"):
        model(**{**given, "guidance": None})
    with pytest.raises(ValueError, match="3 dimensions"):
        model(**{**given, "img": given["img"][0]})


def test_params_can_be_made_by_keyword():
    """Upstream's thirteen fields, none with a default."""
    with pytest.raises(TypeError):
        FluxParams(in_channels=64)


# ---- modulations ahead of the steps


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_modulations_made_ahead_are_those_made_layer_by_layer(guidance_embed):
    model = tiny_models.flux(guidance_embed=guidance_embed)
    given = tiny_models.inputs(3, params=model.params)
    rows = [given[name] for name in ("timesteps", "y", "guidance")]
    mods = model.modulations(*rows)
    assert [x.shape for x in mods] == [(3, 12 * 32)] * 3 + [(3, 3 * 32)] * 4 + [(3, 2 * 32)]
    assert_close(model.observe(Inputs(**given), mods=mods)[0], model(**given), rtol=0, atol=1e-5)
    alike = {
        **given,
        **{
            k: x if x is None else x[:1].expand(3, *x.shape[1:])
            for k, x in given.items()
            if k in ("timesteps", "y", "guidance")
        },
    }
    one = model.modulations(*(x if x is None else x[:1] for x in rows))
    assert_close(model.observe(Inputs(**alike), mods=one)[0], model(**alike), rtol=0, atol=1e-5)


def test_streamed_blocks_make_the_same_modulations():
    model, plain = tiny_models.flux(), tiny_models.flux()
    offloaded = Offloaded(model, torch.device("cpu"), [model.double_blocks, model.single_blocks], 3)
    rows = [tiny_models.inputs(2)[name] for name in ("timesteps", "y", "guidance")]
    with offloaded.on_device():
        got = model.modulations(*rows)
    assert all(torch.equal(a, b) for a, b in zip(got, plain.modulations(*rows), strict=True))


# ---- compiled blocks


@pytest.fixture
def graphs(monkeypatch):
    """Compiles with a backend that only counts: a list that gets one entry for each graph."""
    # Else a failing test prints thousands of lines of its trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_run = Block.compile
    monkeypatch.setattr(Block, "compile", lambda block, **kw: compile_run(block, backend=count, **kw))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_a_sweep_of_skips_compiles_nothing_new(graphs):
    """One graph for each kind of block, whichever layers are skipped. Compiling the model would give one per
    set.
    """
    model, eager = tiny_models.flux(), tiny_models.flux()
    given = tiny_models.inputs(2)
    model.compile_blocks()
    assert_close(model(**given), eager(**given), rtol=0, atol=5e-6)
    assert len(graphs) == 2
    for layer in range(tiny_models.NUM_LAYERS):
        model(**given, intervention=Intervention(skip=frozenset({layer})))
        model(**given, intervention=Intervention(skip=(frozenset({layer}), frozenset())))
    assert len(graphs) == 2


def test_keep_and_inject_compile_once_each(graphs):
    """Plain, recording and injecting blocks of both kinds are six graphs, whichever layers these are."""
    model = tiny_models.flux()
    given = tiny_models.inputs(2)
    model.compile_blocks()
    for vital in ({0, 5}, {1, 2, 3}, {0, 3, 6}, {4}):
        kept = model.observe(Inputs(**given), intervention=Intervention(keep=frozenset(vital)))[1].kept
        model(**given, intervention=Intervention(inject=kept))
    model(**given)
    assert len(graphs) == 6


@pytest.mark.slow
def test_a_session_of_edits_stays_compiled(graphs):
    """Another size and another number of edits cost graphs (none are made after the second of each), but
    never the limit of graphs for one block, beyond which fullgraph raises FailOnRecompileLimitHit.
    """
    model, eager = tiny_models.flux(), tiny_models.flux()
    model.compile_blocks()
    for size in ((64, 64), (48, 80), (96, 64)):
        before = len(graphs)
        keeping = Intervention(keep=frozenset({0, 5}))
        kept = model.observe(Inputs(**tiny_models.inputs(1, *size)), intervention=keeping)[1].kept
        for batch in (1, 3, 2):
            given, inject = tiny_models.inputs(batch, *size), Intervention(inject=kept)
            expected = eager(**given, intervention=inject)
            assert_close(model(**given, intervention=inject), expected, rtol=0, atol=1e-5)
    assert len(graphs) == before, "the third size compiled again"


def test_interventions_on_a_compiled_model_are_checked(graphs):
    model = tiny_models.flux()
    model.compile_blocks()
    with pytest.raises(InputError, match=r"0\.\.6"):
        model(**tiny_models.inputs(1), intervention=Intervention(skip=frozenset({7})))


def test_a_copy_of_a_compiled_block_has_its_own_weights(graphs):
    model, given = tiny_models.flux(), tiny_models.inputs(1)
    model.compile_blocks()
    expected = model(**given)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(copied(**given), expected, rtol=0, atol=5e-6)
