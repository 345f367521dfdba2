"""Text encoders: every form of their files gives the encoder that was saved, and damage is named."""

from pathlib import Path

import gguf
import pytest
import torch
from helpers import weight_files
from safetensors.torch import load_file, save_file

from flux.errors import InputError
from flux.modules.linear import PackedLinear
from flux.settings.demos import ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.util import load_clip, load_t5
from flux.weights.find import find_model
from flux.weights.hub import TEXT_FOLDERS
from flux.weights.layouts import T5_IN_GGUF
from flux.weights.open_model import ModelFiles, OpenModel

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
    for part, model_class in ((T5, T5EncoderModel), (CLIP, CLIPTextModel)):
        model = model_class.from_pretrained(NANO_FOLDER / part, dtype=torch.float32).eval()
        own = features(part)
        tokens = own.tokenizer(TEXTS, max_length=32, padding="max_length", return_tensors="pt")["input_ids"]
        found[part] = model(tokens)[own.output_key]
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
    with pytest.raises(InputError, match=r"an encoder of kind .* expected"):
        features(part, NANO_FOLDER / other)
    path = weight_files.save(encoders[other], tmp_path / "other")
    with pytest.raises(InputError, match=r"which is a .* encoder \(give it as .*\); expected a .* encoder"):
        features(part, path)


@pytest.fixture
def text_folder(tmp_path):
    """The small model's text encoders in a folder of one's own, to be damaged."""
    import shutil

    for name in TEXT_FOLDERS:
        shutil.copytree(NANO_FOLDER / name, tmp_path / name)
    return tmp_path


def load_texts(folder: Path) -> None:
    files = find_model(ModelSettings(text_encoders=str(folder))).files
    load_t5("cpu", folder=files.text)
    load_clip("cpu", folder=files.text)


def test_a_text_encoder_that_is_an_lfs_pointer(text_folder):
    """A clone of FLUX.1's repository without Git-LFS leaves pointers in place of weights."""
    (text_folder / "text_encoder_2" / "model.safetensors").write_bytes(weight_files.LFS_POINTER)
    with pytest.raises(InputError, match="git lfs pull"):
        load_texts(text_folder)


def test_a_text_encoder_cut_short(text_folder):
    path = text_folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="bytes, expected"):
        load_texts(text_folder)


def test_a_text_encoder_without_weights(text_folder):
    (text_folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="text_encoder"):
        load_texts(text_folder)


def test_a_text_encoder_that_lacks_a_tensor(text_folder):
    """transformers would draw it at random and go on with a warning."""
    from safetensors.torch import load_file

    path = text_folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight"):
        load_texts(text_folder)


def test_text_encoders_from_a_folder():
    t5, clip = load_t5("cpu", 16, folder=NANO_FOLDER), load_clip("cpu", folder=NANO_FOLDER)
    assert t5(["a dog"]).shape == (1, 16, 256)
    assert t5(["a dog"]).dtype == torch.bfloat16
    assert clip.is_clip
    assert clip.max_length == 77
    assert load_t5("cpu", name="flux-schnell", folder=NANO_FOLDER).max_length == 256


def test_a_lora_for_an_embedding_is_refused(tmp_path):
    """Only linear layers are changed; the file must not pass for applied."""
    name, width = "lora_te1_text_model_embeddings_token_embedding", configs["flux-nano"].params.vec_in_dim
    words = load_file(NANO_FOLDER / CLIP / "model.safetensors")["embeddings.token_embedding.weight"].shape[0]
    pair = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(words, 2)}
    lora = weight_files.save(pair, tmp_path / "lora")
    with pytest.raises(InputError, match=r"no part of this model: lora_te1_.*_token_embedding"):
        find_model(ModelSettings(lora=({"file": str(lora)},))).check()
