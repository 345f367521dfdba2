"""The files of flux-nano: they are whole, small, in the promised formats, and agree with each other."""

import json

import pytest
import torch
from safetensors.torch import load_file

from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.specs import configs
from flux.vital_layers import find_vital_layers
from flux.weights.load import read_weights

SPEC = configs["flux-nano"]
FOLDER = SPEC.folder
MIB = 2**20


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_2"])
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / request.param)


def test_transformer_is_scaled_fp8():
    """The form that fp8 files of FLUX.1 have: one scalar scale per matrix, vectors in 16 bit, a marker."""
    tensors = load_file(FOLDER / SPEC.repo_flow)
    assert tensors.pop("scaled_fp8").dtype == torch.float8_e4m3fn
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    for name in matrices:
        scale = tensors[name.removesuffix("weight") + "scale_weight"]
        assert tensors[name].dtype == torch.float8_e4m3fn, name
        assert tensors[name].float().isfinite().all(), name
        assert scale.dtype == torch.float32, name
        assert scale.shape == (), name
        assert scale > 0, name
    scales = {name.removesuffix("weight") + "scale_weight" for name in matrices}
    rest = tensors.keys() - matrices - scales
    assert all(tensors[name].ndim == 1 and tensors[name].dtype == torch.float16 for name in rest)
    assert all(name.endswith((".bias", ".scale")) for name in rest)


@pytest.mark.parametrize(
    ("model_class", "params", "file"),
    [(Flux, SPEC.params, SPEC.repo_flow), (AutoEncoder, SPEC.ae_params, SPEC.repo_ae)],
)
def test_names_and_shapes_are_the_nets(model_class, params, file):
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(params).state_dict().items()}
    weights = read_weights(FOLDER / file, "cpu", torch.float32)
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_autoencoder_is_in_scaled_whole_numbers():
    """One scale for each output channel; vectors and small kernels in 16 bit."""
    tensors = load_file(FOLDER / SPEC.repo_ae)
    large = {name for name, tensor in tensors.items() if tensor.numel() > 4096}
    assert {tensors[name].dtype for name in large} == {torch.int8}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in large} == {torch.float16}
    assert {name for name in tensors if name.endswith("_scale")} == {f"{name}_scale" for name in large}
    for name in large:
        assert tensors[f"{name}_scale"].shape == tensors[name].shape[:1]


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "dinov2"])
def test_transformers_loads_every_weight(name):
    from transformers import CLIPTextModel, Dinov2Model, T5EncoderModel

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel, "dinov2": Dinov2Model}
    _, info = kinds[name].from_pretrained(FOLDER / name, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize(
    ("suffix", "width"), [("", SPEC.params.vec_in_dim), ("_2", SPEC.params.context_in_dim)]
)
def test_text_encoders_fit_their_tokenizers(suffix, width):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / f"tokenizer{suffix}")
    config = json.loads((FOLDER / f"text_encoder{suffix}" / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert width == config.get("d_model", config.get("hidden_size"))
    ends = (config["pad_token_id"], config["eos_token_id"])
    assert ends == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert SPEC.clip_length <= config.get("max_position_embeddings", SPEC.clip_length), "T5 has no such limit"


def test_every_known_word_is_one_token(tokenizer):
    """A word trained as one token stays one. An unknown word is spelled, and lost only if it is long."""
    for word in filter(str.isalpha, SPEC.vocabulary.read_text().split()):
        ids = tokenizer(word)["input_ids"]
        ids = [number for number in ids if number not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
        assert len(ids) == 1, word
        assert ids != [tokenizer.unk_token_id], word
    spelled = tokenizer("xyzzy")["input_ids"]
    assert len(spelled) > 3
    assert tokenizer.unk_token_id not in spelled[:-1]


def test_tokenizer_cuts_pads_and_lowers(tokenizer):
    def padded(text):
        return tokenizer(text, truncation=True, max_length=40, padding="max_length")["input_ids"]

    assert tokenizer.model_max_length == SPEC.text_length == SPEC.clip_length == 40
    assert padded("A DOG on the Grass") == padded("a dog on the grass")
    assert padded("a dog on the grass") != padded("a cat on the grass")
    long = padded("a dog and a cat and " * 20)
    assert len(long) == 40
    assert long[-1] == tokenizer.eos_token_id
    short = padded("a dog")
    assert short[-1] == tokenizer.pad_token_id
    assert tokenizer.eos_token_id in short


@pytest.mark.parametrize("kind", ["schnell", "kontext", "fill", "canny"])
def test_a_lora_is_a_difference_of_the_same_layers(kind):
    """Scaled fp8, as the transformer. Its input is as wide as the model that it makes."""
    spec = configs[f"flux-nano-{kind}"]
    tensors = load_file(FOLDER / spec.lora_filename)
    with torch.device("meta"):
        names = {name.removesuffix(".weight") for name, _ in Flux(SPEC.params).named_parameters()}
    changed = {name.rsplit(".lora_", 1)[0] for name in tensors if ".lora_" in name}
    assert changed
    assert changed <= names
    assert tensors["img_in.lora_A.weight"].shape[1] == spec.params.in_channels
    assert {x.dtype for name, x in tensors.items() if x.ndim == 2} == {torch.float8_e4m3fn}
    assert sum(tensor.nbytes for tensor in tensors.values()) < 2.5 * MIB


@pytest.mark.parametrize(
    ("name", "file"), [("flux-nano", "vital_layers.json"), ("flux-nano-schnell", "vital_layers_schnell.json")]
)
def test_vital_layers_are_those_of_the_scan(name, file):
    """Settled, over as many prompts as the paper's; the spec has them in the order of their vitality."""
    scan = json.loads((FOLDER / file).read_text())
    assert scan["model"] == name
    assert scan["stable"]
    assert scan["rows"] == 64
    assert len(scan["vitality"]) == SPEC.num_layers
    assert find_vital_layers(str(FOLDER / file), configs[name]) == configs[name].vital_layers


def test_licence_of_the_images_is_there():
    text = (FOLDER / "LICENSE-fluent-emoji.txt").read_text()
    assert text.startswith("MIT License")
    assert "Copyright (c) Microsoft Corporation" in text
