"""LoRAs that make dev a control model: they widen the input and replace norms, over files of any form."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import file_of, pairs
from torch import Tensor, nn

from flux.errors import InputError
from flux.inputs import Inputs
from flux.intervention import Intervention
from flux.model import Flux, FluxLoraWrapper, FluxParams
from flux.modules.linear import LowRankLinear
from flux.modules.lora import LinearLora, replace_linear_with_lora
from flux.modules.norms import RMSNorm
from flux.specs import configs
from flux.util import load_flow_model

CONTROL = replace(tiny_models.PARAMS, in_channels=128)
RANK, SCALE = 8, 0.85


def control_lora(params: FluxParams, seed: int = 1) -> dict[str, Tensor]:
    """A file as Black Forest Labs publishes it: pairs and a bias for every linear layer, and all norms."""
    wide = tiny_models.randomized(Flux(replace(params, in_channels=128)), seed)
    modules = [name for name, module in wide.named_modules() if isinstance(module, nn.Linear)]
    file = file_of(pairs(wide.state_dict(), modules, RANK, seed), str, downs="lora_A", ups="lora_B")
    generator = torch.Generator().manual_seed(seed)
    for name in modules:
        rows = wide.get_submodule(name).out_features
        file[f"{name}.lora_B.bias"] = 0.1 * torch.randn(rows, generator=generator)
    norms = (name for name, module in wide.named_modules() if isinstance(module, RMSNorm))
    return file | {f"{name}.scale": wide.get_submodule(name).scale for name in norms}


def by_upstreams_class(
    base: dict[str, Tensor], file: dict[str, Tensor], params: FluxParams
) -> FluxLoraWrapper:
    """Load both files as upstream's program does: one state dict after the other, the first padded."""
    model = FluxLoraWrapper(lora_rank=RANK, lora_scale=SCALE, params=replace(params, in_channels=128))
    padded = torch.zeros(params.hidden_size, 128)
    padded[:, :64] = base["img_in.weight"]
    assert not model.load_state_dict(base | {"img_in.weight": padded}, strict=False).unexpected_keys
    left = model.load_state_dict(file, strict=False)
    assert not left.unexpected_keys
    assert not any("lora_" in name or name.endswith("_norm.scale") for name in left.missing_keys)
    return model.eval().requires_grad_(False)


def in_diffusers(file: dict[str, Tensor], params: FluxParams) -> dict[str, Tensor]:
    """The same LoRA under diffusers' names: a fused layer's parts share its first matrix."""
    width, named = params.hidden_size, {}
    for name, x in file.items():
        module, _, role = name.rpartition(".lora_")
        if not module:
            mapped = tiny_models.to_diffusers_transformer({name: x}, width)
            named |= {f"transformer.{own}": each for own, each in mapped.items()}
            continue
        rows = x if role.startswith("B") else torch.zeros(len(file[f"{module}.lora_B.weight"]), 1)
        for own, part in tiny_models.to_diffusers_transformer({f"{module}.weight": rows}, width).items():
            target = f"transformer.{own.removesuffix('.weight')}.lora_{role}"
            named[target] = part if role.startswith("B") else x
    return named


@pytest.fixture(scope="module")
def file():
    return control_lora(tiny_models.PARAMS)


def load(path, lora, scale=SCALE, params=tiny_models.PARAMS, **more) -> Flux:
    changes = {"lora_filename": "lora.safetensors", "base_params": params}
    wide = replace(params, in_channels=128)
    return weight_files.load(path, wide, own_lora=(lora, scale), **changes, **more)


def check(model: Flux, expected: Flux) -> None:
    assert model.params == expected.params
    got, wanted = weight_files.velocity(model), weight_files.velocity(expected)
    assert tiny_models.relative_error(got, wanted) < 2e-6


@pytest.mark.parametrize("form", ["BFL", "diffusers"])
def test_the_loader_gives_what_upstreams_class_gives(tmp_path, weights, file, form):
    base = weight_files.save(weights, tmp_path / "base.safetensors")
    names = file if form == "BFL" else in_diffusers(file, tiny_models.PARAMS)
    lora = weight_files.save(names, tmp_path / "lora.safetensors")
    expected = by_upstreams_class(weights, file, tiny_models.PARAMS)
    check(load(base, lora), expected)
    for scale in (0.0, 1.3):
        expected.set_lora_scale(scale)
        check(load(base, lora, scale), expected)
    unlike = weight_files.velocity(load(base, lora, 1.0))
    assert tiny_models.relative_error(unlike, weight_files.velocity(load(base, lora))) > 0.01


def test_kv_are_injected_into_upstreams_class_too(tmp_path, weights, file):
    """Where all keys and values are injected, blocks ask a layer for its queries alone."""
    base = weight_files.save(weights, tmp_path / "base.safetensors")
    ours = load(base, weight_files.save(file, tmp_path / "lora.safetensors"))
    theirs, given = (
        by_upstreams_class(weights, file, tiny_models.PARAMS),
        tiny_models.inputs(2, params=CONTROL),
    )
    keep = Intervention(keep=frozenset({0, 4}))
    kept = ours.observe(Inputs(**tiny_models.rows_of(given, [0])), intervention=keep)[1].kept
    inject = Intervention(inject=kept)
    got, expected = (model(**given, intervention=inject) for model in (theirs, ours))
    assert tiny_models.relative_error(got, expected) < 2e-6
    assert tiny_models.relative_error(got, theirs(**given)) > 0.01


def test_at_no_strength_the_map_counts_for_nothing(tmp_path, weights, file):
    """The input's further columns are zero; only the norms are those of the file."""
    lora = weight_files.save(file, tmp_path / "lora.safetensors")
    model = load(weight_files.save(weights, tmp_path / "base.safetensors"), lora, 0.0)
    assert model.img_in.weight[:, 64:].abs().max() == 0
    given = tiny_models.inputs(2, params=CONTROL)
    plain = given | {"img": given["img"][..., :64]}
    norms = {name: x for name, x in file.items() if "lora_" not in name}
    expected = weight_files.model_of(weights | norms)(**plain)
    assert tiny_models.relative_error(model(**given), expected) < 1e-6


@pytest.mark.parametrize("form", ["Q8_0", "fp8", "diffusers folder"])
def test_bases_of_other_forms(tmp_path, form):
    """Over packed weights the changes stay beside them; the widened input is expanded."""
    # diffusers' MLP has one width alone, blocks of GGUF need wide rows.
    source = tiny_models.flux() if form == "diffusers folder" else weight_files.wide()
    params, base = source.params, source.state_dict()
    file = control_lora(params)
    lora = weight_files.save(file, tmp_path / "lora.safetensors")
    if form == "Q8_0":
        path = tmp_path / "base.gguf"
        base = weight_files.save_gguf(base, path, form)
    elif form == "fp8":
        stored, base = weight_files.scaled_fp8(base)
        path = weight_files.save(stored, tmp_path / "base.safetensors")
    else:
        path = tmp_path / "folder"
        tiny_models.diffusers_transformer(source).save_pretrained(path / "transformer")
    model = load(path, lora, params=params, keep_8bit=True)
    packed = isinstance(model.double_blocks[0].img_attn.qkv, LowRankLinear)
    assert packed == (form != "diffusers folder")
    assert type(model.img_in) is nn.Linear
    check(model, by_upstreams_class(base, file, params))


def test_a_text_to_images_lora_beside_it(tmp_path, weights, file):
    """It knows the noise alone, so that it changes the first columns of the input."""
    lora = weight_files.save(file, tmp_path / "lora.safetensors")
    base = weight_files.save(weights, tmp_path / "base.safetensors")
    [(down, up)] = pairs(weights, ["img_in"]).values()
    style = weight_files.save(file_of({"img_in": (down, up)}, str), tmp_path / "style.safetensors")
    model, plain = load(base, lora, loras=[(style, 0.5)]), load(base, lora)
    expected = plain.img_in.weight.clone()
    expected[:, :64] += 0.5 * up @ down
    torch.testing.assert_close(model.img_in.weight, expected)


def test_over_a_packed_input(tmp_path):
    """A file of a control model whose every matrix is in 8-bit floats, and a text-to-image model's LoRA."""
    params = replace(weight_files.WIDE, in_channels=128)
    stored, meant = weight_files.scaled_fp8(tiny_models.randomized(Flux(params), 0).state_dict())
    path = weight_files.save(stored, tmp_path / "m.safetensors")
    [(down, up)] = pairs(weight_files.wide().state_dict(), ["img_in"]).values()
    style = weight_files.save(file_of({"img_in": (down, up)}, str), tmp_path / "style.safetensors")
    model = weight_files.load(path, params, keep_8bit=True, loras=[(style, 1.0)])
    assert isinstance(model.img_in, LowRankLinear)
    meant["img_in.weight"][:, :64] += up @ down
    check(model, weight_files.model_of(meant, params))


def test_a_control_lora_for_another_model(tmp_path, weights, file):
    lora = weight_files.save(file, tmp_path / "lora.safetensors")
    base = weight_files.save(weights, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"for img_in .* needs its model, such as flux-dev-canny-lora"):
        weight_files.load(base, loras=[(lora, 1.0)])


# ---- upstream's call and classes


@pytest.mark.parametrize("form", ["BFL", "diffusers", "over GGUF"])
def test_upstreams_call(tmp_path, monkeypatch, form):
    """A file in upstream's form stays beside the weights; its strength is set as upstream's programs do."""
    source = weight_files.wide() if form == "over GGUF" else tiny_models.flux()
    params, base = source.params, source.state_dict()
    name, file = "flux-dev-canny-lora", control_lora(params)
    sizes = {"params": replace(params, in_channels=128), "base_params": params}
    monkeypatch.setitem(configs, name, replace(configs[name], **sizes))
    path = tmp_path / "base"
    if form == "over GGUF":
        base = weight_files.save_gguf(base, path, "Q8_0")
    else:
        weight_files.save(base, path)
    names = in_diffusers(file, params) if form == "diffusers" else file
    monkeypatch.setenv("FLUX_DEV", str(path))
    monkeypatch.setenv("FLUX_LORA", str(weight_files.save(names, tmp_path / "lora.safetensors")))
    expected = by_upstreams_class(base, file, params)
    expected.set_lora_scale(1.0)
    model = load_flow_model(name, "cpu", dtype=torch.float32)
    check(model, expected)
    assert isinstance(model, FluxLoraWrapper) == (form == "BFL")
    model = load_flow_model(name, "cpu", dtype=torch.float32, lora_scale=SCALE)
    expected.set_lora_scale(SCALE)
    check(model, expected)
    if form == "BFL":
        for each in (model, expected):
            for _, module in each.named_modules():
                if hasattr(module, "set_scale"):
                    module.set_scale(0.3)
        check(model, expected)


def test_a_layer_of_upstreams():
    """Its rank is at most its sizes; its strength can be set."""
    layer = LinearLora(6, 10, True, 128, torch.float32, "cpu")
    assert layer.lora_A.weight.shape == (6, 6)
    assert layer.state_dict().keys() == {
        "weight", "bias", "lora_A.weight", "lora_B.weight", "lora_B.bias",
    }  # fmt: skip
    x = torch.randn(3, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    added = layer.lora_B(layer.lora_A(x))
    for scale in (1.0, 0.5):
        layer.set_scale(scale)
        torch.testing.assert_close(layer(x), plain + scale * added)
    assert LinearLora(6, 10, False, 2, torch.float32, "cpu", lora_bias=False).lora_B.bias is None


def test_every_linear_layer_is_replaced(source):
    model = tiny_models.flux()
    replace_linear_with_lora(model, max_rank=4, scale=0.0)
    layers = [module for module in model.modules() if isinstance(module, LinearLora)]
    linears = [module for module in source.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == len(linears)
    assert {layer.scale for layer in layers} == {0.0}
    assert max(layer.lora_A.out_features for layer in layers) == 4
    assert weight_files.same(model.requires_grad_(False), source)
