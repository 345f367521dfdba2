"""Changes to the text encoders in another form: the encoders come out the same, here and in diffusers."""

import pytest
import torch
from helpers import weight_files
from helpers.lora_files import ALPHA, RANK, assert_alpha_moved, file_of, pairs
from safetensors.torch import load_file

from flux.lora.merge import convert, merge, merge_into
from flux.specs import NANO_FOLDER, configs
from flux.weights.open_model import LoraUse, ModelFiles, OpenModel

PARTS = ("text_encoder", "text_encoder_2")
MODULES = {
    "text_encoder": ("encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc1"),
    "text_encoder_2": (
        "encoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.0.layer.1.DenseReluDense.wi_0",
    ),
}
KOHYA = {"text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te3_"}


def encoder(part, *loras):
    model = OpenModel(
        configs["flux-nano"], ModelFiles(NANO_FOLDER, NANO_FOLDER, NANO_FOLDER, loras=tuple(loras))
    )
    return model.load_text_encoder(part, "cpu", torch.float32, max_length=32).hf_module


def matrices(part, *loras):
    return [encoder(part, *loras).get_submodule(module).weight for module in MODULES[part]]


def of_text_encoders(seed=0, rank=RANK):
    """Kohya's names for changes of both text encoders."""
    file = {}
    for part in PARTS:
        weights = encoder(part).state_dict()
        chosen = pairs(weights, MODULES[part], rank=rank, seed=seed)
        file |= file_of(chosen, lambda m, p=part: KOHYA[p] + m.replace(".", "_"), ALPHA)
    return file


@pytest.fixture
def transformer(tiny, weights):
    module = "double_blocks.0.img_attn.qkv"
    return file_of(pairs(weights, [module]), lambda m: "lora_unet_" + m.replace(".", "_"), ALPHA)


@pytest.fixture
def source(transformer, tmp_path):
    return weight_files.save(transformer | of_text_encoders(), tmp_path / "x.safetensors")


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_text_encoders_come_out_the_same(source, tmp_path, form):
    out = tmp_path / "out.safetensors"
    convert(source, out, form)
    for part in PARTS:
        for plain, found, expected in zip(
            matrices(part), matrices(part, LoraUse(out)), matrices(part, LoraUse(source))
        ):
            assert torch.allclose(found, expected, atol=1e-6)
            assert not torch.allclose(found, plain, atol=1e-3)


def test_there_and_back_is_the_same_file(source, tmp_path):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    convert(source, there, "diffusers")
    names = {name.split(".lora_")[0] for name in load_file(there) if not name.startswith("transformer.")}
    assert names == {
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
        "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q",
        "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0",
    }
    convert(there, back, "kohya")
    assert_alpha_moved(load_file(source), load_file(back))


def test_diffusers_reads_clips_changes(source, tmp_path):
    """With the scale that the file's metadata say. diffusers has no adapters for T5."""
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel

    convert(source, tmp_path / "out.safetensors", "diffusers")
    tensors, metadata = FluxPipeline.lora_state_dict(
        tmp_path, weight_name="out.safetensors", return_lora_metadata=True
    )
    clip = CLIPTextModel.from_pretrained(NANO_FOLDER / "text_encoder", dtype=torch.float32)
    # The names of its modules have no "text_model" in transformers 5, which diffusers takes as they are.
    own = {name.replace("text_model.", ""): x for name, x in tensors.items()}
    described = {
        key: [name.replace("text_model.", "") for name in value] if key.endswith("target_modules") else value
        for key, value in metadata.items()
    }
    FluxPipeline.load_lora_into_text_encoder(own, None, clip, prefix="text_encoder", metadata=described)
    for module, expected in zip(MODULES["text_encoder"], matrices("text_encoder", LoraUse(source))):
        layer = clip.get_submodule(module)
        assert torch.allclose(layer.weight + layer.get_delta_weight("default_0"), expected, atol=1e-6)


def test_merged_they_add_up(source, transformer, tmp_path):
    other = weight_files.save(transformer | of_text_encoders(seed=5, rank=2), tmp_path / "other.safetensors")
    merge([source, other], tmp_path / "both.safetensors", [0.5, -1.5], form="diffusers")
    for part in PARTS:
        expected = matrices(part, LoraUse(source, 0.5), LoraUse(other, -1.5))
        for found, each in zip(matrices(part, LoraUse(tmp_path / "both.safetensors")), expected):
            assert torch.allclose(found, each, atol=1e-6)


# ---- what is left out, and warned of


def test_bfls_form_has_no_names_for_them(source, tmp_path):
    with pytest.warns(UserWarning, match="are left out") as told:
        convert(source, tmp_path / "out.safetensors", "bfl")
    assert [str(each.message) for each in told] == [
        "The changes to CLIP are left out: bfl has no names for them",
        "The changes to T5 are left out: bfl has no names for them",
    ]
    assert not any("encoder" in name for name in load_file(tmp_path / "out.safetensors"))


def test_other_changes_are_told(source, tmp_path):
    norm = {"lora_te3_encoder_final_layer_norm.diff": torch.ones(64)}
    given = weight_files.save(load_file(source) | norm, tmp_path / "y.safetensors")
    with pytest.warns(
        UserWarning, match=r"1 changes to T5 are no pairs .*: lora_te3_encoder_final_layer_norm"
    ):
        convert(given, tmp_path / "out.safetensors", "diffusers")


def test_a_transformers_file_has_no_place_for_them(base, source, tmp_path):
    with pytest.warns(UserWarning, match="its changes to CLIP and T5 are left out"):
        merge_into(base, [source], tmp_path / "merged.safetensors")
