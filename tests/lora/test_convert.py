"""LoRA files in another form: read back here, and by diffusers, with the same numbers."""

import json

import pytest
import torch
from helpers import tiny_models, weight_files
from helpers.lora_files import ALPHA, MODULES, assert_alpha_moved, file_of, pairs
from safetensors import safe_open
from safetensors.torch import load_file

from flux.errors import InputError
from flux.lora.__main__ import main
from flux.lora.contents import open_lora
from flux.lora.merge import convert

FORMS = ("kohya", "bfl", "diffusers")
BLOCKS = [module for module in MODULES if "blocks" in module]


def kohya(module):
    return "lora_unet_" + module.replace(".", "_")


@pytest.fixture
def source(tiny, weights, tmp_path):
    """A file of kohya's with an alpha, and the weights that it leads to."""
    chosen = pairs(weights, MODULES)
    return weight_files.save(file_of(chosen, kohya, ALPHA), tmp_path / "x.safetensors", ss_steps="1500")


def error(base, first, second):
    """The largest difference of the velocities with either file, relative to the largest velocity."""
    loaded = (weight_files.load(base, loras=[(path, 1.0)]) for path in (first, second))
    return tiny_models.relative_error(*map(weight_files.velocity, loaded))


@pytest.mark.parametrize("form", FORMS)
def test_same_numbers_and_names(base, source, tmp_path, form):
    out = tmp_path / "out.safetensors"
    convert(source, out, form)
    assert error(base, out, source) < 2e-6
    lora = open_lora(out)
    assert lora.names == {"kohya": "kohya", "bfl": "BFL", "diffusers": "diffusers"}[form]
    assert lora.file.checkpoint.metadata["ss_steps"] == "1500"


def test_there_and_back_is_the_same_file(source, tmp_path):
    """Parts that share their first factor become one pair of the first rank again."""
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert(source, there, "diffusers")
    convert(there, back, "kohya")
    assert_alpha_moved(load_file(source), load_file(back))


def test_parts_of_their_own_become_blocks(tiny, weights, base, tmp_path):
    """to_q and to_v have factors of their own, of two ranks; to_k stays as it was."""
    torch.manual_seed(0)
    file = {}
    for part, rank in (("q", 2), ("v", 3)):
        name = f"transformer.transformer_blocks.1.attn.to_{part}"
        file |= {
            f"{name}.lora_A.weight": torch.randn(rank, 32),
            f"{name}.lora_B.weight": torch.randn(32, rank),
        }
    source = weight_files.save(file, tmp_path / "x.safetensors")
    fused = tmp_path / "fused.safetensors"
    convert(source, fused, "bfl")
    assert load_file(fused)["double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (5, 32)
    assert error(base, fused, source) < 2e-6
    convert(fused, tmp_path / "again.safetensors", "diffusers")
    again = load_file(tmp_path / "again.safetensors")
    assert {name: x.shape for name, x in again.items()} == {name: x.shape for name, x in file.items()}
    assert all(torch.equal(again[name], file[name]) for name in file)


@pytest.mark.parametrize("form", FORMS)
def test_biases(tiny, weights, base, tmp_path, form):
    """A module with a pair, the one whose rows diffusers swaps, and one without a pair keep theirs."""
    swapped, alone = "final_layer.adaLN_modulation.1", "vector_in.in_layer"
    file = file_of(pairs(weights, ["img_in", swapped]), lambda m: m, None, "lora_A", "lora_B")
    file |= {f"{m}.lora_B.bias": torch.randn(len(weights[f"{m}.bias"])) for m in (swapped, alone)}
    source = weight_files.save(file, tmp_path / "x.safetensors")
    convert(source, tmp_path / "out.safetensors", form)
    assert error(base, tmp_path / "out.safetensors", source) < 2e-6


def test_diffusers_gives_the_same_numbers(weights, source, base, tmp_path):
    """Its own loader of a transformer's adapters, on ranks that differ between the modules."""
    file = load_file(source)
    more = pairs(weights, ["single_blocks.2.linear2"], rank=7, seed=3)
    mixed = weight_files.save(file | file_of(more, kohya, 5.0), tmp_path / "mixed.safetensors")
    # diffusers' way with the rows of `norm_out.linear` is its own bug's.
    modules = [name for name in load_file(mixed) if "adaLN" not in name]
    mixed = weight_files.save({name: load_file(mixed)[name] for name in modules}, mixed)
    convert(mixed, tmp_path / "out.safetensors", "diffusers")
    net = tiny_models.diffusers_transformer(weight_files.model_of(weights))
    net.load_lora_adapter(tmp_path, weight_name="out.safetensors", prefix="transformer")
    given = tiny_models.inputs(1)
    expected = weight_files.load(base, loras=[(mixed, 1.0)])(**given)
    assert tiny_models.relative_error(tiny_models.ask_diffusers(net, given), expected) < 2e-6
    plain = weight_files.load(base)(**given)
    assert tiny_models.relative_error(plain, expected) > 0.1


def test_diffusers_reads_kohyas_form(tmp_path):
    """At full size, since its sizes are typed into diffusers' converter."""
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    file = {}
    for part, rows in {"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}.items():
        name = f"transformer.single_transformer_blocks.7.{part}"
        file |= {f"{name}.lora_A.weight": torch.randn(2, 3072), f"{name}.lora_B.weight": torch.randn(rows, 2)}
    source = weight_files.save(file, tmp_path / "x.safetensors")
    convert(source, tmp_path / "kohya.safetensors", "kohya")
    read = FluxPipeline.lora_state_dict(tmp_path, weight_name="kohya.safetensors")
    for part in ("attn.to_q", "attn.to_v", "proj_mlp"):
        name = f"transformer.single_transformer_blocks.7.{part}"
        product, expected = (x[f"{name}.lora_B.weight"] @ x[f"{name}.lora_A.weight"] for x in (read, file))
        assert tiny_models.relative_error(product, expected) < 1e-6


@pytest.mark.parametrize(("stored", "expected"), [("float16", torch.float16), ("float32", torch.float32)])
def test_dtype(source, tmp_path, stored, expected):
    out = tmp_path / "out.safetensors"
    main(["convert", str(source), "--form", "bfl", "--output", str(out), "--dtype", stored])
    assert {x.dtype for x in load_file(out).values()} == {expected}


def test_metadata_of_peft_is_written_anew(tiny, weights, tmp_path):
    """Its alphas are in the factors now; a reader must not apply them again."""
    config = {"transformer.r": 4, "transformer.lora_alpha": 32, "transformer.target_modules": ["proj_out"]}
    chosen = pairs(weights, ["single_blocks.3.linear2"])
    names = file_of(
        chosen, lambda m: "transformer.single_transformer_blocks.3.proj_out", None, "lora_A", "lora_B"
    )
    source = weight_files.save(names, tmp_path / "x.safetensors", lora_adapter_metadata=json.dumps(config))
    for form in FORMS:
        out = tmp_path / f"{form}.safetensors"
        convert(source, out, form)
        patch = open_lora(out).patches[0]
        product = patch.scale * patch.change.matrix(patch.place, 1.0, torch.device("cpu"))
        down, up = chosen["single_blocks.3.linear2"]
        assert tiny_models.relative_error(product, 8 * up @ down) < 2e-6
        with safe_open(out, "pt") as file:
            assert ("lora_adapter_metadata" in file.metadata()) == (form == "diffusers")


def test_an_existing_file_stays(source, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(InputError, match=r"which exists: name another file, or give --force"):
        convert(source, out, "bfl")
    assert out.read_text() == "mine"
    convert(source, out, "bfl", force=True)
    assert open_lora(out).names == "BFL"


@pytest.mark.parametrize("name", ["out", "out.gguf", "out.bin"])
def test_a_name_of_another_kind_of_file(source, tmp_path, name):
    with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors"):
        convert(source, tmp_path / name, "bfl")


def test_a_file_of_zeros_has_nothing_to_convert(tiny, tmp_path):
    pair = {"lora_A.weight": torch.ones(2, 32), "lora_B.weight": torch.zeros(96, 2)}
    source = weight_files.save(
        {f"{BLOCKS[0]}.{name}": x for name, x in pair.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(InputError, match="no layer is changed"):
        convert(source, tmp_path / "out.safetensors", "diffusers")


def test_other_forms_are_refused(tiny, tmp_path):
    module = "double_blocks.1.img_attn.qkv"
    file = {f"{module}.lokr_w1": torch.randn(12, 4), f"{module}.lokr_w2": torch.randn(8, 8)}
    source = weight_files.save(file, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="with LoKr: only pairs of factors can be written anew"):
        convert(source, tmp_path / "out.safetensors", "kohya")
    assert not (tmp_path / "out.safetensors").exists()
