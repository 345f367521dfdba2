"""Layouts: every form that files of the transformer and the autoencoder come in gives the saved model."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models, weight_files

from flux.errors import InputError
from flux.modules.autoencoder import AutoEncoder
from flux.modules.linear import PackedLinear
from flux.weights.open_model import ModelFiles, OpenModel

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, *FP8])
def test_single_files(tmp_path, weights, prefix, stored):
    file = {name: x.to(stored) for name, x in weights.items()}
    expected = weight_files.model_of({name: x.float() for name, x in file.items()})
    assert weight_files.same(
        weight_files.load(weight_files.save(weight_files.with_prefix(file, prefix), tmp_path / "any.name")),
        expected,
    )


@pytest.mark.parametrize("shard", ["20KB", "10GB"])
@pytest.mark.parametrize("inside", ["transformer", ""])
def test_folders_that_diffusers_writes(tmp_path, source, shard, inside):
    """One file or shards, where q, k and v of a layer may lie in different ones; or the folder above."""
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list(tmp_path.glob("transformer/*.safetensors"))) > 9) == (shard == "20KB")
    assert weight_files.same(weight_files.load(tmp_path / inside), source)


def test_diffusers_and_the_package_agree_on_its_own_files(tmp_path, source):
    """Not by the tests' table of names alone: the folder that diffusers wrote, loaded by both."""
    from diffusers import FluxTransformer2DModel

    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path)
    theirs, ours = FluxTransformer2DModel.from_pretrained(tmp_path), weight_files.load(tmp_path)
    given = tiny_models.inputs(2)
    expected = tiny_models.ask_diffusers(theirs, given)
    assert tiny_models.relative_error(ours(**given), expected) < 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf_with_diffusers_names(tmp_path, kind):
    """Packed projections are joined as they are: blocks never cross rows."""
    model = weight_files.wide()
    file = tiny_models.to_diffusers_transformer(model.state_dict(), 256)
    held = weight_files.save_gguf(
        {name: x.contiguous() for name, x in file.items()}, tmp_path / "m.gguf", kind
    )
    plain = weight_files.load(weight_files.save(held, tmp_path / "m.safetensors"), weight_files.WIDE)
    packed = weight_files.load(tmp_path / "m.gguf", weight_files.WIDE)
    assert isinstance(packed.single_blocks[0].linear1, PackedLinear)
    assert weight_files.same(packed, plain)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder_files(tmp_path, prefix):
    own = tiny_models.autoencoder()
    path = weight_files.save(weight_files.with_prefix(own.state_dict(), prefix), tmp_path / "ae")
    check_autoencoder(own, path)


@pytest.mark.parametrize("inside", ["vae", ""])
def test_autoencoder_folders(tmp_path, inside):
    own = tiny_models.autoencoder()
    tiny_models.diffusers_autoencoder(own).save_pretrained(tmp_path / "vae")
    check_autoencoder(own, tmp_path / inside)


def check_autoencoder(own: AutoEncoder, path) -> None:
    files = ModelFiles(path, path, path)
    model = OpenModel(weight_files.spec(), files).load_autoencoder("cpu", torch.float32)
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(image), own(image))


def test_guidance_tells_dev_from_schnell_in_both_layouts(tmp_path, source, weights):
    schnell = replace(tiny_models.PARAMS, guidance_embed=False)
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "folder")
    for path in (tmp_path / "folder", weight_files.save(weights, tmp_path / "file")):
        with pytest.raises(InputError, match=r"it is a dev file .* load it as flux-dev"):
            weight_files.load(path, schnell)


def test_parts_that_do_not_go_together(tmp_path, weights):
    """Queries, keys and values whose rows only add up to the right number."""
    file = tiny_models.to_diffusers_transformer(weights, 32)
    q, k = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    file[q], file[k] = torch.zeros(40, 32), torch.zeros(24, 32)
    path = weight_files.save(file, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"double_blocks\.0\.img_attn\.qkv\.weight"):
        weight_files.load(path)
