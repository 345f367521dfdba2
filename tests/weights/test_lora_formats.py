"""LoRA formats: each change is merged as its definition says, or kept apart over packed weights."""

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import ALPHA, MODULES, RANK, STRENGTH, added, close, file_of, pairs

from flux.errors import InputError
from flux.intervention import Intervention
from flux.model import Inputs
from flux.modules.linear import LowRankLinear
from flux.specs import NANO_FOLDER, configs
from flux.weights.open_model import LoraUse, ModelFiles, OpenModel


def test_biases_norms_and_whole_differences(tmp_path, weights, base):
    """Files of BFL and ComfyUI hold more than pairs: biases are added, norms replaced."""
    chosen = pairs(weights, ["img_in", "double_blocks.0.img_attn.qkv"])
    scale = "double_blocks.1.img_attn.norm.query_norm.scale"
    bias, whole = torch.randn(32), torch.randn(32, 20) * 0.1
    file = file_of(chosen, lambda m: m, None, "lora_A", "lora_B")
    file |= {"img_in.lora_B.bias": bias, "txt_in.diff": whole, "vector_in.in_layer.diff_b": bias}
    file[scale] = weights[scale] + 0.5
    path = weight_files.save(file, tmp_path / "lora")
    expected = added(weights, chosen, STRENGTH)
    expected[scale] = file[scale]
    expected["txt_in.weight"] = weights["txt_in.weight"] + STRENGTH * whole
    for name in ("img_in.bias", "vector_in.in_layer.bias"):
        expected[name] = weights[name] + STRENGTH * bias
    assert close(weight_files.load(base, loras=[(path, STRENGTH)]), expected)


def test_a_plain_bias_has_no_part_in_alpha_over_rank(tmp_path, weights, base):
    """Whichever stands first in the file."""
    module, bias = "vector_in.in_layer", torch.randn(32)
    chosen = pairs(weights, [module])
    file = {f"{module}.diff_b": bias, **file_of(chosen, lambda m: m, ALPHA, "lora_A", "lora_B")}
    path = weight_files.save(file, tmp_path / "lora")
    expected = added(weights, chosen, STRENGTH * ALPHA / RANK)
    expected[f"{module}.bias"] = weights[f"{module}.bias"] + STRENGTH * bias
    assert close(weight_files.load(base, loras=[(path, STRENGTH)]), expected)


@pytest.mark.parametrize("factored", [(), ("w1",), ("w2",), ("w1", "w2")])
def test_lokr(tmp_path, weights, base, factored):
    """Whole factors have no rank, and then alpha says nothing."""
    module, shapes = "double_blocks.0.img_attn.qkv", {"w1": (12, 4), "w2": (8, 8)}
    file, factors = {}, {}
    for name, (rows, columns) in shapes.items():
        if name in factored:
            a, b = torch.randn(rows, 2) * 0.3, torch.randn(2, columns) * 0.3
            file |= {
                f"lora_unet_{module.replace('.', '_')}.lokr_{name}_{k}": x for k, x in (("a", a), ("b", b))
            }
            factors[name] = a @ b
        else:
            factors[name] = torch.randn(rows, columns) * 0.2
            file[f"lora_unet_{module.replace('.', '_')}.lokr_{name}"] = factors[name]
    file[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)
    path = weight_files.save(file, tmp_path / "lora")
    scale = ALPHA / 2 if factored else 1.0
    expected = dict(weights)
    expected[f"{module}.weight"] = weights[f"{module}.weight"] + scale * torch.kron(
        factors["w1"], factors["w2"]
    )
    assert close(weight_files.load(base, loras=[(path, 1.0)]), expected)


def test_loha(tmp_path, weights, base):
    module, parts = "single_blocks.0.linear2", {}
    rows, columns = weights[f"{module}.weight"].shape
    for name in ("w1", "w2"):
        parts[f"hada_{name}_a"], parts[f"hada_{name}_b"] = (
            torch.randn(rows, RANK),
            torch.randn(RANK, columns) * 0.1,
        )
    file = {f"lora_unet_{module.replace('.', '_')}.{name}": x for name, x in parts.items()}
    file[f"lora_unet_{module.replace('.', '_')}.alpha"] = torch.tensor(ALPHA)
    first, second = (parts[f"hada_{n}_a"] @ parts[f"hada_{n}_b"] for n in ("w1", "w2"))
    expected = dict(weights)
    expected[f"{module}.weight"] = weights[f"{module}.weight"] + ALPHA / RANK * first * second
    assert close(weight_files.load(base, loras=[(weight_files.save(file, tmp_path / "lora"), 1.0)]), expected)


def test_several_add_up(tmp_path, weights, base):
    first, second = pairs(weights, seed=1), pairs(weights, MODULES[2:5], rank=2, seed=2)
    paths = [
        weight_files.save(file_of(chosen, lambda m: m, None, "lora_A", "lora_B"), tmp_path / str(index))
        for index, chosen in enumerate((first, second))
    ]
    expected = added(added(weights, first, 0.5), second, -1.5)
    assert close(weight_files.load(base, loras=[(paths[0], 0.5), (paths[1], -1.5)]), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_K"])
def test_kept_apart_over_packed_weights(tmp_path, kind):
    """Two files, one in diffusers' names, and every way through a block that projects some rows only."""
    own = weight_files.wide().state_dict()
    held = weight_files.save_gguf(own, tmp_path / "m.gguf", kind)
    modules = ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2")
    first, second = pairs(own, modules, seed=1), pairs(own, modules[1:3], rank=2, seed=2)
    theirs = {}
    for module, (down, up) in second.items():
        for name, part in tiny_models.to_diffusers_transformer({f"{module}.weight": up}, 256).items():
            theirs[name.removesuffix(".weight")] = down, part
    file = file_of(first, lambda m: m, ALPHA, "lora_A", "lora_B")
    file["double_blocks.0.img_attn.qkv.lora_B.bias"] = torch.full((768,), 0.5)
    paths = (
        weight_files.save(file, tmp_path / "first"),
        weight_files.save(
            file_of(theirs, lambda m: "transformer." + m, None, "lora_A", "lora_B"), tmp_path / "second"
        ),
    )
    model = weight_files.load(
        tmp_path / "m.gguf", weight_files.WIDE, loras=[(paths[0], STRENGTH), (paths[1], 1.0)]
    )
    assert isinstance(model.single_blocks[0].linear1, LowRankLinear)
    assert isinstance(model.img_in, torch.nn.Linear), "not packed, hence merged"
    expected = added(added(held, first, STRENGTH * ALPHA / RANK), second, 1.0)
    name = "double_blocks.0.img_attn.qkv.bias"
    expected[name] = held[name] + STRENGTH * ALPHA / RANK * 0.5
    assert close(model, expected, weight_files.WIDE)
    plain, given = (
        weight_files.model_of(expected, weight_files.WIDE),
        tiny_models.inputs(2, params=weight_files.WIDE),
    )
    keep = Intervention(keep=frozenset({0, 1}))
    kept = plain.observe(Inputs(**tiny_models.rows_of(given, [0])), intervention=keep)[1].kept
    taken = Intervention(inject=kept)
    assert (
        tiny_models.relative_error(model(**given, intervention=taken), plain(**given, intervention=taken))
        < 2e-6
    )


def test_what_is_not_low_rank_is_merged_into_the_expanded_matrix(tmp_path):
    held = weight_files.save_gguf(weight_files.wide().state_dict(), tmp_path / "m.gguf", "Q4_0")
    difference = torch.randn(256, 256) * 0.01
    path = weight_files.save({"double_blocks.0.img_attn.proj.diff": difference}, tmp_path / "lora")
    model = weight_files.load(tmp_path / "m.gguf", weight_files.WIDE, loras=[(path, 1.0)])
    expected = {
        **held,
        "double_blocks.0.img_attn.proj.weight": held["double_blocks.0.img_attn.proj.weight"] + difference,
    }
    assert isinstance(model.double_blocks[0].img_attn.proj, torch.nn.Linear)
    assert close(model, expected, weight_files.WIDE)


@pytest.mark.parametrize(
    ("part", "prefix"), [("text_encoder", "lora_te1_text_model_"), ("text_encoder_2", "lora_te3_")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_encoders(tmp_path, part, prefix, packed):

    def load(**files):
        model = OpenModel(configs["flux-nano"], ModelFiles(NANO_FOLDER, NANO_FOLDER, NANO_FOLDER, **files))
        return model.load_text_encoder(part, "cpu", torch.float32, max_length=32)

    plain = load()
    module = (
        "encoder.layers.0.self_attn.q_proj"
        if part == "text_encoder"
        else "encoder.block.1.layer.0.SelfAttention.q"
    )
    weight = plain.hf_module.get_submodule(module).weight
    chosen = pairs({f"{module}.weight": weight}, [module])
    path = weight_files.save(
        file_of(chosen, lambda m: prefix + m.replace(".", "_"), ALPHA), tmp_path / "lora"
    )
    where = {}
    if packed:
        own = {name: x for name, x in plain.hf_module.state_dict().items() if "embed_tokens" not in name}

        def pack(name, x):
            return name == f"{module}.weight"

        weight_files.save_gguf(own, tmp_path / "m.gguf", "Q8_0", pack=pack)
        where = {"clip" if part == "text_encoder" else "t5": tmp_path / "m.gguf"}
        plain = load(**where)
    changed = load(loras=(LoraUse(path, STRENGTH),), **where)
    down, up = chosen[module]
    expected = plain.hf_module.get_submodule(module).weight + STRENGTH * ALPHA / RANK * (up @ down)
    assert torch.allclose(changed.hf_module.get_submodule(module).weight, expected, atol=1e-6)
    assert not torch.equal(changed(["a dog"]), plain(["a dog"]))


@pytest.mark.parametrize(
    ("module", "down", "up"),
    [
        ("transformer.transformer_blocks.0.attn.to_q", "lora_A.default_0.weight", "lora_B.default_0.weight"),
        ("unet.transformer_blocks.0.attn.to_q", "lora_A.weight", "lora_B.weight"),
        ("transformer.double_blocks.0.img_attn.qkv.0", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_double_blocks_0_img_attn_qkv_0", "lora_down.weight", "lora_up.weight"),
        ("lora_unet_transformer_blocks_0_attn_to_q_", "lora_down.weight", "lora_up.weight"),
    ],
)
@pytest.mark.parametrize("axes", [(), (1, 1)])
def test_spellings_of_a_change_to_the_queries(tmp_path, weights, base, module, down, up, axes):
    """Adapter names, numbered parts, a trailing underscore, 1x1 convolutions."""
    matrix = weights["double_blocks.0.img_attn.qkv.weight"]
    [pair] = pairs({"q.weight": matrix[: matrix.shape[1]]}, ["q"]).values()
    file = {f"{module}.{name}": x.reshape(*x.shape, *axes) for name, x in zip((down, up), pair, strict=True)}
    path = weight_files.save(file, tmp_path / "lora")
    expected = dict(weights)
    changed = matrix.clone()
    changed[: matrix.shape[1]] += pair[1] @ pair[0]
    expected["double_blocks.0.img_attn.qkv.weight"] = changed
    assert close(weight_files.load(base, loras=[(path, 1.0)]), expected)


def test_a_trained_word_is_left_out_with_a_warning(tmp_path, weights, base):
    chosen = pairs(weights, ["img_in"])
    file = file_of(chosen, lambda m: m, None, "lora_A", "lora_B")
    path = weight_files.save({**file, "bundle_emb.sks.clip_l": torch.zeros(2, 8)}, tmp_path / "lora")
    with pytest.warns(UserWarning, match="sks, trained with it, are left out"):
        model = weight_files.load(base, loras=[(path, 1.0)])
    assert close(model, added(weights, chosen, 1.0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lycoris_img_in.oft_diag", "an OFT of an early form"),
        ("transformer.x_embedder.oft_r", "an OFT of an early form"),
        ("transformer.x_embedder.boft_R", "a BOFT"),
        ("lycoris_img_in.oft_blocks", "a BOFT"),
        ("lora_unet_img_in.lora_mid.weight", "Tucker"),
        ("transformer.x_embedder.ia3_l", "other than LoRA"),
    ],
)
def test_forms_that_are_not_known_are_named(tmp_path, base, name, expected):
    path = weight_files.save({name: torch.zeros(2, 4, 4, 4)}, tmp_path / "lora")
    with pytest.raises(InputError, match=f"which is .*{expected}.*: not supported"):
        weight_files.load(base, loras=[(path, 1.0)])


def test_two_adapters_in_one_file(tmp_path, weights, base):
    down, up = pairs(weights, ["img_in"])["img_in"]
    file = {f"img_in.lora_{x}.{adapter}.weight": m for adapter in "ab" for x, m in (("A", down), ("B", up))}
    path = weight_files.save(file, tmp_path / "lora")
    with pytest.raises(InputError, match="two adapters in one file"):
        weight_files.load(base, loras=[(path, 1.0)])
