"""A LoRA beside frozen layers: its numbers and gradients, packed weights, what is spared, what is written."""

import json

import pytest
import torch
from helpers import tiny_models, weight_files
from torch import nn

from flux.errors import InputError
from flux.lora.adapters import (
    FrozenLinear,
    LoraLinear,
    Target,
    add_adapters,
    find_targets,
    prepare_backward,
)
from flux.lora.saved import save_lora
from flux.modules.linear import Fp8Linear, PackedLinear, QuantizedLinear
from flux.runtime.offload import Offloaded
from flux.runtime.quantize import quantize_linears, to_fp8

pytestmark = pytest.mark.gradients

PARTS = ("attention", "mlp")
LAYERS = (1, tiny_models.NUM_DOUBLE + 1)


def adapted(model, layers=LAYERS, parts=PARTS, rank=4, alpha=2.0, seed=0):
    """The adapters of a model, all factors random."""
    adapters = add_adapters(model, find_targets(model.params, layers, parts, rank, alpha), seed, "cpu")
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        adapter.up.data.normal_(0, 0.1, generator=generator)
    return adapters


def gradients(model, adapters) -> dict[str, torch.Tensor]:
    for adapter in adapters.values():
        adapter.down.grad = adapter.up.grad = None
    model(**tiny_models.inputs()).square().mean().backward()
    pairs = {name: (adapter.down.grad, adapter.up.grad) for name, adapter in adapters.items()}
    return {f"{name}.{n}": grad for name, grads in pairs.items() for n, grad in enumerate(grads)}


def test_forward_and_gradients_equal_pefts_on_diffusers_model():
    """float32, relative to the largest number; measured 4.3e-7 for the velocity, 2.7e-6 for the gradients."""
    from peft import LoraConfig, get_peft_model

    model = tiny_models.flux()
    net = tiny_models.diffusers_transformer(model)
    adapters = adapted(model)
    names = [their for adapter in adapters.values() for their, _ in adapter.target.in_diffusers()]
    peft = get_peft_model(net, LoraConfig(r=4, lora_alpha=2.0, target_modules=names))
    theirs = dict(peft.base_model.model.named_modules())
    for adapter in adapters.values():
        for their, rows in adapter.target.in_diffusers():
            theirs[their].lora_A["default"].weight.data.copy_(adapter.down.data)
            theirs[their].lora_B["default"].weight.data.copy_(adapter.up.data[rows])
    given = tiny_models.inputs()
    ours, expected = model(**given), tiny_models.ask_diffusers(peft, given)
    assert tiny_models.relative_error(ours.detach(), expected.detach()) < 2e-6
    for velocity in (ours, expected):
        velocity.square().mean().backward()
    for name, adapter in adapters.items():
        parts = list(adapter.target.in_diffusers())
        ups = torch.cat([theirs[their].lora_B["default"].weight.grad for their, _ in parts])
        # Queries, keys and values share our first factor: its gradient is the sum of theirs.
        down = sum(theirs[their].lora_A["default"].weight.grad for their, _ in parts)
        assert tiny_models.relative_error(adapter.up.grad, ups) < 1e-5, name
        assert tiny_models.relative_error(adapter.down.grad, down) < 1e-5, name


def test_a_new_adapter_changes_nothing():
    model = tiny_models.flux()
    plain = model(**tiny_models.inputs())
    add_adapters(model, find_targets(model.params, LAYERS, PARTS, 4, None), 0, "cpu")
    assert torch.equal(model(**tiny_models.inputs()), plain)


@pytest.mark.parametrize(
    ("parts", "modules", "rows"),
    [
        (("attention",), {"img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj"}, (0, 96)),
        (("mlp",), {"img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"}, (96, 224)),
    ],
)
def test_parts_choose_modules_and_rows(parts, modules, rows):
    """A single-stream block's first matrix belongs to both parts, by rows; other rows stay as they are."""
    targets = find_targets(tiny_models.PARAMS, LAYERS, parts, 4, None)
    double = {target.module.split(".", 2)[2] for target in targets if target.layer == LAYERS[0]}
    assert double == modules
    single = {target.module: (target.start, target.stop) for target in targets if target.layer == LAYERS[1]}
    assert single == {"single_blocks.1.linear1": rows, "single_blocks.1.linear2": (0, 32)}

    torch.manual_seed(0)
    linear = nn.Linear(32, 224).requires_grad_(False)
    target = next(target for target in targets if target.module.endswith("linear1"))
    lora = LoraLinear(linear, target, torch.randn(4, 32))
    lora.up.data.normal_()
    x = torch.randn(2, 5, 32)
    added = lora(x) - linear(x)
    inside = torch.zeros(224, dtype=torch.bool)
    inside[slice(*rows)] = True
    assert (added != 0).any(dim=(0, 1)).equal(inside)
    torch.testing.assert_close(nn.functional.linear(x, lora.weight, linear.bias), lora(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(lora.project(x, 40, 120), lora(x)[..., 40:120], rtol=0, atol=1e-4)


def test_a_rank_for_each_layer():
    targets = find_targets(tiny_models.PARAMS, LAYERS, PARTS, {LAYERS[0]: 2, LAYERS[1]: 8}, None)
    assert {(target.layer, target.rank, target.alpha) for target in targets} == {(1, 2, 2.0), (4, 8, 8.0)}
    assert sum(target.parameters for target in targets if target.layer == 1) == 2 * (
        # queries, keys and values, the projection back, and the MLP's two, of both streams
        2 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))
    )


@pytest.mark.parametrize(
    ("ranks", "message"), [({1: 2}, "no rank for layers [4]"), ({1: 2, 4: 2, 5: 2}, "a rank for layers [5]")]
)
def test_ranks_of_other_layers_are_refused(ranks, message):
    with pytest.raises(InputError) as refused:
        find_targets(tiny_models.PARAMS, LAYERS, PARTS, ranks, None)
    assert message in str(refused.value)


@pytest.mark.parametrize("layers", [(), (7,)])
def test_no_trainable_layer_is_refused(layers):
    with pytest.raises(InputError, match="no layer to train"):
        find_targets(tiny_models.PARAMS, layers, PARTS, 4, None)


def test_checkpointing_and_a_prefix_without_a_backward_change_no_bit():
    model = tiny_models.flux()
    adapters = adapted(model)
    plain = gradients(model, adapters)
    prepare_backward(model, min(LAYERS), checkpointing=True)
    again = gradients(model, adapters)
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert min(grad.abs().max() for grad in plain.values()) > 0


def test_nothing_is_recorded_before_the_first_trained_layer():
    model = tiny_models.flux()
    adapted(model, (4,))
    prepare_backward(model, 4, checkpointing=False)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: None)
        run = block.run

        def watched(*args, run=run):
            out = run(*args)
            seen.append(out[0].requires_grad)
            return out

        block.run = watched
    model(**tiny_models.inputs())
    assert seen == [False] * 4 + [True] * 3


def dense_twin(model):
    """A model with plain matrices that are what a packed model's expand to."""
    twin = tiny_models.flux()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | PackedLinear | Fp8Linear):
            twin.get_submodule(name).weight.data.copy_(module.weight)
    return twin


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_through_quantised_weights(bits):
    """They are those of a plain model with the same matrices; measured 2e-7 relative."""
    model = tiny_models.flux()
    quantize_linears([model.double_blocks, model.single_blocks], bits)
    twin = dense_twin(model)
    found, expected = (gradients(each, adapted(each)) for each in (model, twin))
    for name in expected:
        assert tiny_models.relative_error(found[name], expected[name]) < 1e-6, name
    kinds = {type(module) for module in model.double_blocks[2].modules()}
    assert FrozenLinear in kinds
    assert FrozenLinear not in {type(module) for module in model.double_blocks[0].modules()}


def test_gradients_pass_through_gguf(tmp_path):
    params = weight_files.WIDE
    held = weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "q8.gguf", "Q8_0")
    model = weight_files.load(tmp_path / "q8.gguf", params, keep_8bit=True)
    twin = weight_files.model_of(held, params)
    targets = find_targets(params, (0, 2), PARTS, 4, None)
    found = []
    for each in (model, twin):
        adapters = add_adapters(each, targets, 0, "cpu")
        each(**tiny_models.inputs(params=params)).square().mean().backward()
        found.append([adapter.up.grad for adapter in adapters.values()])
    assert isinstance(model.single_blocks[1].linear1.base, FrozenLinear)
    for ours, expected in zip(*found, strict=True):
        assert tiny_models.relative_error(ours, expected) < 1e-6


def test_gradients_pass_through_8_bit_floats():
    """Rounding of activations counts as if it changed nothing, so gradients are near a plain model's.

    Measured a cosine of 0.991 at least.
    """
    model = tiny_models.flux()
    to_fp8([model.double_blocks, model.single_blocks])
    twin = dense_twin(model)
    found, expected = (gradients(each, adapted(each)) for each in (model, twin))
    for name in expected:
        cosine = nn.functional.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.98, name


def test_streamed_blocks_give_the_same_gradients():
    """Blocks come to the device in turn, in the backward pass too."""
    model, streamed = tiny_models.flux(), tiny_models.flux()
    expected = gradients(model, adapted(model))
    stacks = [streamed.double_blocks, streamed.single_blocks]
    offloaded = Offloaded(streamed, torch.device("cpu"), stacks, 7)
    adapters = adapted(streamed)
    prepare_backward(streamed, min(LAYERS), checkpointing=True)
    for _ in range(2):
        with offloaded.on_device():
            found = gradients(streamed, adapters)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def written(tmp_path, model, rank):
    adapters = adapted(model, rank=rank, alpha=None)
    save_lora(
        tmp_path / "lora.safetensors", adapters, torch.float32, {"layers": LAYERS, "base_model": "tiny"}
    )
    return tmp_path / "lora.safetensors", adapters


@pytest.mark.parametrize("rank", [4, {1: 2, 4: 8}])
def test_the_file_loads_here_and_in_diffusers(tmp_path, weights, rank):
    """With ranks of their own for layers, too."""
    from diffusers import FluxPipeline
    from safetensors.torch import load_file

    model = tiny_models.flux()
    net = tiny_models.diffusers_transformer(model)
    path, adapters = written(tmp_path, model, rank)
    given = tiny_models.inputs()
    with torch.no_grad():
        expected = model(**given)
        base = weight_files.save(weights, tmp_path / "base.safetensors")
        merged = weight_files.load(base, loras=[(path, 1.0)])
        assert tiny_models.relative_error(merged(**given), expected) < 2e-6

        state, alphas = FluxPipeline.lora_state_dict(load_file(path), return_alphas=True)
        FluxPipeline.load_lora_into_transformer(state, alphas, net)
        assert tiny_models.relative_error(tiny_models.ask_diffusers(net, given), expected) < 2e-6
    assert len(adapters) == 8 + 2


def test_the_file_says_what_it_is(tmp_path):
    from safetensors import safe_open

    path, _ = written(tmp_path, tiny_models.flux(), 4)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert json.loads(about["layers"]) == list(LAYERS)
    assert about["base_model"] == "tiny"
    first = path.read_bytes()
    assert written(tmp_path, tiny_models.flux(), 4)[0].read_bytes() == first


def test_targets_count_their_numbers():
    target = Target("single_blocks.0.linear1", 3, 0, 96, 224, 32, 4, 4.0)
    assert target.parameters == 4 * (32 + 96)
    assert [name for name, _ in target.in_diffusers()] == [
        f"single_transformer_blocks.0.attn.to_{part}" for part in "qkv"
    ]
