"""Every form that files of the four nets come in gives the net that was saved."""

import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from helpers import tiny_models, weight_files
from safetensors.torch import load_file, save_file

from flux.errors import InputError
from flux.modules.autoencoder import AutoEncoder
from flux.modules.linear import PackedLinear
from flux.pipeline import Pipeline
from flux.settings.complete import resolve
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.weights.find import find_model
from flux.weights.layouts import T5_IN_GGUF, describe_file
from flux.weights.open_model import ModelFiles, OpenModel

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(scope="module")
def source():
    return tiny_models.flux()


@pytest.fixture(scope="module")
def weights(source):
    return source.state_dict()


def same(model, expected) -> bool:
    return torch.equal(weight_files.velocity(model), weight_files.velocity(expected))


# ---- the transformer


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, *FP8])
def test_single_files(tmp_path, weights, prefix, stored):
    file = {name: x.to(stored) for name, x in weights.items()}
    expected = weight_files.model_of({name: x.float() for name, x in file.items()})
    assert same(
        weight_files.load(weight_files.save(weight_files.with_prefix(file, prefix), tmp_path / "any.name")),
        expected,
    )


@pytest.mark.parametrize("shard", ["20KB", "10GB"])
@pytest.mark.parametrize("inside", ["transformer", ""])
def test_folders_that_diffusers_writes(tmp_path, source, shard, inside):
    """One file or shards, where q, k and v of a layer may lie in different ones; or the folder above."""
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list(tmp_path.glob("transformer/*.safetensors"))) > 9) == (shard == "20KB")
    assert same(weight_files.load(tmp_path / inside), source)


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
    assert same(packed, plain)


@pytest.mark.parametrize("ending", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_scaled_8_bit_floats(tmp_path, weights, ending, per_row, keep):
    file, meant = weight_files.scaled_fp8(weights, ending, per_row)
    file["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    for name in list(file):
        if name.endswith(ending):
            file[
                name.replace(
                    ending, {".scale_weight": ".scale_input", ".weight_scale": ".input_scale"}[ending]
                )
            ] = torch.ones(())
    path = weight_files.save(
        weight_files.with_prefix(file, "model.diffusion_model."), tmp_path / "m.safetensors"
    )
    model = weight_files.load(path, keep_8bit=keep)
    assert isinstance(model.img_in, PackedLinear) == keep
    assert same(model, weight_files.model_of(meant))


@pytest.mark.parametrize("where", ["header", "tensors"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "nvfp4"])
def test_what_newer_8_bit_files_say_of_themselves(tmp_path, weights, where, kind):
    file, meant = weight_files.scaled_fp8(weights, ".weight_scale")
    metadata = {}
    if where == "header":
        layers = {"img_in": {"format": kind}}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        text = json.dumps({"format": kind}).encode()
        file["img_in.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    path = weight_files.save(file, tmp_path / "m.safetensors", **metadata)
    if kind == "nvfp4":
        with pytest.raises(InputError, match="img_in is quantised as 'nvfp4': not supported"):
            weight_files.load(path)
    else:
        assert same(weight_files.load(path), weight_files.model_of(meant))


def test_folders_with_half_precision_beside_the_plain_form(tmp_path, source):
    net = tiny_models.diffusers_transformer(source)
    net.save_pretrained(tmp_path)
    net.half().save_pretrained(tmp_path, variant="fp16")
    assert same(weight_files.load(tmp_path), source)


# ---- the autoencoder


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
    net = OpenModel(weight_files.spec(), files).load_autoencoder("cpu", torch.float32)
    picture = torch.rand(1, 3, 32, 32)
    assert torch.equal(net(picture), own(picture))


# ---- the text encoders


TEXTS = ["a dog on the grass", "a red car"]
T5, CLIP = "text_encoder_2", "text_encoder"


@pytest.fixture(scope="module")
def encoders():
    """Each encoder's weights under the names that older transformers wrote, and its features."""
    found = {}
    for part in (T5, CLIP):
        file = load_file(NANO_FOLDER / part / "model.safetensors")
        found[part] = {name: x.float() for name, x in file.items()}
    return found


def features(part: str, path=None):
    files = ModelFiles(NANO_FOLDER, NANO_FOLDER, NANO_FOLDER, **{"t5" if part == T5 else "clip": path})
    model = OpenModel(configs["flux-nano"], files)
    return model.load_text_encoder(part, "cpu", torch.float32, max_length=32)


@pytest.fixture(scope="module")
@torch.inference_mode()
def expected():
    from transformers import CLIPTextModel, T5EncoderModel

    found = {}
    for part, net_class in ((T5, T5EncoderModel), (CLIP, CLIPTextModel)):
        net = net_class.from_pretrained(NANO_FOLDER / part, dtype=torch.float32).eval()
        own = features(part)
        tokens = own.tokenizer(TEXTS, max_length=32, padding="max_length", return_tensors="pt")["input_ids"]
        found[part] = net(tokens)[own.output_key]
    return found


@pytest.mark.parametrize("part", [T5, CLIP])
def test_encoders_as_transformers_loads_them(part, expected):
    assert torch.equal(features(part)(TEXTS), expected[part])


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight", "both"])
@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
def test_t5_files(tmp_path, encoders, expected, name, prefix):
    file = dict(encoders[T5])
    embedding = file.pop("shared.weight", file.get("encoder.embed_tokens.weight"))
    names = ["shared.weight", "encoder.embed_tokens.weight"] if name == "both" else [name]
    file |= {each: embedding.clone() for each in names}
    file |= {
        "spiece_model": torch.zeros(9, dtype=torch.uint8),
        "decoder.final_layer_norm.weight": torch.ones(2),
    }
    path = weight_files.save(weight_files.with_prefix(file, prefix), tmp_path / "t5")
    assert torch.equal(features(T5, path)(TEXTS), expected[T5])


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
def test_t5_gguf(tmp_path, encoders, expected, kind):
    """Names by the `gguf` package's own table. The matrices stay packed, the embedding cannot."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 4)
    file = {
        table.get_name(name, try_suffixes=(".weight",)): x
        for name, x in encoders[T5].items()
        if name != "encoder.embed_tokens.weight"
    }
    assert len({name.partition(".")[0] for name in file}) == 2
    assert len(T5_IN_GGUF) == 10

    def pack(name, x):
        return kind != "F32" and x.ndim == 2 and "rel_b" not in name

    held = weight_files.save_gguf(file, tmp_path / "t5.gguf", kind, "t5encoder", pack)
    back = {table.get_name(name, try_suffixes=(".weight",)): name for name in encoders[T5]}
    plain = weight_files.save({back[name]: x for name, x in held.items()}, tmp_path / "plain")
    packed = features(T5, tmp_path / "t5.gguf")
    assert isinstance(packed.hf_module.encoder.block[0].layer[1].DenseReluDense.wo, PackedLinear) == (
        kind != "F32"
    )
    assert torch.equal(packed(TEXTS), features(T5, plain)(TEXTS))
    if kind == "F32":
        assert torch.equal(packed(TEXTS), expected[T5])


@pytest.mark.parametrize(
    "form", ["text_model.", "", "text_encoders.clip_l.transformer.text_model.", "openai"]
)
def test_clip_files(tmp_path, encoders, expected, form):
    """transformers 5 leaves "text_model." out; the whole CLIP has its vision half beside it."""
    own = {name.removeprefix("text_model."): x for name, x in encoders[CLIP].items()}
    file = weight_files.with_prefix(own, "text_model." if form == "openai" else form)
    if form == "openai":
        file |= {"logit_scale": torch.ones(()), "vision_model.post_layernorm.weight": torch.ones(3)}
    path = weight_files.save(file, tmp_path / "clip")
    assert torch.equal(features(CLIP, path)(TEXTS), expected[CLIP])


def test_an_encoder_in_8_bit_floats(tmp_path, encoders):
    file, meant = weight_files.scaled_fp8(encoders[T5])
    scaled = features(T5, weight_files.save(file, tmp_path / "scaled"))
    assert torch.equal(scaled(TEXTS), features(T5, weight_files.save(meant, tmp_path / "meant"))(TEXTS))


@pytest.mark.parametrize(("part", "other"), [(T5, CLIP), (CLIP, T5)])
def test_the_other_encoder(tmp_path, encoders, part, other):
    with pytest.raises(InputError, match="an encoder of kind .* expected"):
        features(part, NANO_FOLDER / other)
    path = weight_files.save(encoders[other], tmp_path / "other")
    with pytest.raises(InputError, match="which is a .* encoder; expected a .* encoder"):
        features(part, path)


# ---- whole models in one file or folder


@pytest.fixture(scope="module")
def nano_parts():
    spec = configs["flux-nano"]
    from flux.weights.load import read_weights

    parts = {
        "model.diffusion_model.": read_weights(spec.folder / spec.repo_flow, "cpu", torch.float16),
        "vae.": read_weights(spec.folder / spec.repo_ae, "cpu", torch.float16),
        "text_encoders.t5xxl.transformer.": load_file(spec.folder / T5 / "model.safetensors"),
        "text_encoders.clip_l.transformer.": load_file(spec.folder / CLIP / "model.safetensors"),
    }
    return {prefix + name: x for prefix, part in parts.items() for name, x in part.items()}


def test_all_in_one(tmp_path, nano_parts):
    """All four nets come out of the one file: the package's own may be anything."""
    extra = {
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "text_encoders.t5xxl.logit_scale": torch.ones(()),
    }
    path = weight_files.save(nano_parts | extra, tmp_path / "all.safetensors")
    settings = ModelSettings(weights=str(path), device="cpu", dtype="float32")
    files = find_model(settings).files
    assert (files.flow, files.ae, files.t5, files.clip) == (path,) * 4
    assert files.text == NANO_FOLDER
    pipe = Pipeline.load(resolve(settings))
    plain = Pipeline.load(resolve(ModelSettings(device="cpu", dtype="float32")))
    for net in ("t5", "clip"):
        assert torch.equal(getattr(pipe, net)(TEXTS), getattr(plain, net)(TEXTS))
    assert all(
        torch.equal(a.half(), b.half()) for a, b in zip(pipe.model.parameters(), plain.model.parameters())
    )
    assert all(torch.equal(a, b) for a, b in zip(pipe.ae.parameters(), plain.ae.parameters()))


def test_a_whole_folder(tmp_path, source, monkeypatch):
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "transformer")
    tiny_models.diffusers_autoencoder(tiny_models.autoencoder()).save_pretrained(tmp_path / "vae")
    for name in (T5, CLIP, "tokenizer", "tokenizer_2"):
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")
    spec = weight_files.spec()
    monkeypatch.setitem(configs, "flux-dev", spec)
    model = find_model(ModelSettings(model="flux-dev", weights=str(tmp_path)))
    assert {model.files.of(part) for part in ("transformer", "vae", T5, CLIP)} == {tmp_path}
    model.check()


# ---- files of other nets


OTHERS = {
    "an SDXL model": [
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
    ],
    "a Stable Diffusion model": ["model.diffusion_model.input_blocks.0.0.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "a Stable Diffusion 3 transformer": ["pos_embed.proj.weight", "transformer_blocks.0.attn.to_q.weight"],
    "a Chroma transformer": ["distilled_guidance_layer.in_proj.weight", "img_in.weight"],
    "a FLUX.2 transformer": ["double_stream_modulation_img.lin.weight", "img_in.weight"],
    "an autoencoder": ["decoder.mid.attn_1.q.weight"],
    "a T5 encoder": ["encoder.block.0.layer.0.SelfAttention.k.weight"],
    "a CLIP text encoder": ["text_model.embeddings.token_embedding.weight"],
    "a LoRA or another adapter": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"],
    "1 tensors of a net not known here (it begins with 'nothing')": ["nothing"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_other_nets_are_named(tmp_path, what):
    path = weight_files.save({name: torch.zeros(2, 2) for name in OTHERS[what]}, tmp_path / "m.safetensors")
    with pytest.raises(InputError) as error:
        weight_files.load(path)
    message = str(error.value)
    assert f"which is {what}" in message
    assert message.endswith("expected a FLUX.1 transformer")
    assert "\n" not in message


def test_nothing_at_all():
    assert describe_file([]) == "0 tensors of a net not known here"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("img_in.weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        ("single_blocks.0.linear1.wscales", "Nunchaku"),
        ("img_in.weight._data", "quanto"),
    ],
)
def test_forms_that_are_not_supported_are_named(tmp_path, weights, name, what):
    path = weight_files.save({**weights, name: torch.zeros(4, dtype=torch.uint8)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=what):
        weight_files.load(path)


@pytest.mark.parametrize(("columns", "what"), [(128, "canny or depth"), (384, "fill")])
def test_models_with_more_inputs_are_named(tmp_path, weights, columns, what):
    path = weight_files.save(
        {**weights, "img_in.weight": torch.zeros(32, columns)}, tmp_path / "m.safetensors"
    )
    with pytest.raises(InputError, match=what):
        weight_files.load(path)


def test_guidance_tells_dev_from_schnell_in_both_layouts(tmp_path, source, weights):
    schnell = replace(tiny_models.PARAMS, guidance_embed=False)
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path / "folder")
    for path in (tmp_path / "folder", weight_files.save(weights, tmp_path / "file")):
        with pytest.raises(InputError, match="it is a dev file .* load it as flux-dev"):
            weight_files.load(path, schnell)


def test_parts_that_do_not_go_together(tmp_path, weights):
    """Queries, keys and values whose rows only add up to the right number."""
    file = tiny_models.to_diffusers_transformer(weights, 32)
    q, k = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"
    file[q], file[k] = torch.zeros(40, 32), torch.zeros(24, 32)
    path = weight_files.save(file, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"double_blocks\.0\.img_attn\.qkv\.weight"):
        weight_files.load(path)


def test_shards(tmp_path, source):
    """A missing one, one that the index does not fit, and an index that names files elsewhere."""
    tiny_models.diffusers_transformer(source).save_pretrained(tmp_path, max_shard_size="20KB")
    [index] = tmp_path.glob("*.index.json")
    whole, first = json.loads(index.read_text()), sorted(tmp_path.glob("*.safetensors"))[0]
    kept = first.read_bytes()
    first.unlink()
    with pytest.raises(InputError, match=f"{first.name} is missing"):
        weight_files.load(tmp_path)
    save_file({"other": torch.zeros(1)}, first)
    with pytest.raises(InputError, match="does not fit its index"):
        weight_files.load(tmp_path)
    first.write_bytes(kept)
    assert same(weight_files.load(tmp_path), source)
    name = next(iter(whole["weight_map"]))
    for wrong in ("../elsewhere.safetensors", "model.bin"):
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], name: wrong}}))
        with pytest.raises(InputError, match="expected files beside it"):
            weight_files.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is a folder and holds no .safetensors file"),
        (["pytorch_model.bin"], "a pickle, never loaded"),
        (["a.safetensors", "b.safetensors"], r"several files \(a.safetensors, b.safetensors\)"),
    ],
)
def test_folders_without_one_file(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(np.zeros(9, np.uint8).tobytes())
    with pytest.raises(InputError, match=message):
        weight_files.load(tmp_path)
