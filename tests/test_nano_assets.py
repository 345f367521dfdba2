"""What flux-nano ships: its files are whole, small, in the promised formats, and agree with each other."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flux.loading import read_weights
from flux.model import Flux
from flux.modules.autoencoder import AutoEncoder
from flux.specs import configs

SPEC = configs["flux-nano"]
FOLDER = SPEC.folder
MIB = 2**20


def ids_by_hand(prompt: str, vocabulary: dict[str, int]) -> list[int]:
    """The ids that the text encoders were trained with."""
    words = prompt.lower().replace(",", " , ").replace(".", " ").split()
    ids = [vocabulary.get(word, 2) for word in words][:31] + [1]
    return ids + [0] * (32 - len(ids))


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, int]:
    words = (FOLDER / "vocabulary.txt").read_text().splitlines()
    return {word: number for number, word in enumerate(words)}


@pytest.fixture(scope="module", params=["tokenizer", "tokenizer_2"])
def tokenizer(request):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER / request.param)


def test_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 48 * MIB


def test_transformer_is_scaled_fp8():
    """The form that fp8 files of FLUX.1 have: one scalar scale per matrix, vectors in 16 bit, a marker."""
    tensors = load_file(FOLDER / SPEC.repo_flow)
    assert tensors.pop("scaled_fp8").dtype == torch.float8_e4m3fn
    matrices = {name for name, tensor in tensors.items() if tensor.ndim == 2}
    for name in matrices:
        scale = tensors[name.removesuffix("weight") + "scale_weight"]
        assert tensors[name].dtype == torch.float8_e4m3fn and tensors[name].float().isfinite().all(), name
        assert scale.dtype == torch.float32 and scale.shape == () and scale > 0, name
    scales = {name.removesuffix("weight") + "scale_weight" for name in matrices}
    rest = tensors.keys() - matrices - scales
    assert all(tensors[name].ndim == 1 and tensors[name].dtype == torch.bfloat16 for name in rest)
    assert all(name.endswith((".bias", ".scale")) for name in rest)


@pytest.mark.parametrize(
    ("net_class", "params", "file"),
    [(Flux, SPEC.params, SPEC.repo_flow), (AutoEncoder, SPEC.ae_params, SPEC.repo_ae)],
)
def test_names_and_shapes_are_the_nets(net_class, params, file):
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in net_class(params).state_dict().items()}
    weights = read_weights(FOLDER / file, "cpu", torch.float32)
    assert {name: tensor.shape for name, tensor in weights.items()} == expected
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_autoencoder_is_16_bit():
    with safe_open(FOLDER / SPEC.repo_ae, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2", "dinov2"])
def test_transformers_loads_every_weight(name):
    from transformers import CLIPTextModel, Dinov2Model, T5EncoderModel

    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel, "dinov2": Dinov2Model}
    _, info = kinds[name].from_pretrained(FOLDER / name, output_loading_info=True)
    assert not any(info.values()), info


def test_text_encoders_fit_the_tokenizers(tokenizer):
    for name, width in (
        ("text_encoder", SPEC.params.vec_in_dim),
        ("text_encoder_2", SPEC.params.context_in_dim),
    ):
        config = json.loads((FOLDER / name / "config.json").read_text())
        assert config["vocab_size"] == len(tokenizer)
        assert width == config.get("d_model", config.get("hidden_size"))
        assert (config["pad_token_id"], config["eos_token_id"]) == (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )


def test_tokenizer_has_the_vocabulary(tokenizer, vocabulary):
    assert tokenizer.get_vocab() == vocabulary
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == SPEC.text_length == SPEC.clip_length == 32


def test_tokenizer_gives_the_ids_of_training(tokenizer, vocabulary):
    prompts = [
        "",
        " \t\n ",
        ". , .. ,,",
        "a dog on the grass",
        "A DOG, on the Grass.",
        "a,,dog , ,cat...cow",
        "a\tdog\non\u00a0the\u2003grass\x1cby\x85the\u3000sea\u200bside",
        "an u.f.o. at 3.5 km, xyzzy",
        "</s> <pad> <UNK> dog</s>cat",
        "Zürich, 中文 🐕 İ ΑΣ",
        "dog " * 40,
        "dog," * 16,
    ]
    chance = random.Random(0)
    for _ in range(300):
        words = chance.choices([*vocabulary, "xyzzy", "Café"], k=chance.randrange(45))
        between = (chance.choice([" ", " ", "  ", ",", ", ", ".", ". ", "\t"]) for _ in words)
        cases = (chance.choice([str, str.upper, str.title]) for _ in words)
        prompts.append("".join(case(word) + gap for case, word, gap in zip(cases, words, between)))
    tokens = tokenizer(prompts, truncation=True, max_length=32, padding="max_length", return_tensors="pt")
    assert tokens["input_ids"].tolist() == [ids_by_hand(prompt, vocabulary) for prompt in prompts]
    assert tokens["input_ids"][0].tolist() == [1] + [0] * 31
    assert torch.equal(tokens["attention_mask"][0], (torch.arange(32) < 1).long())


def test_vital_layers_are_layers():
    preset = json.loads((FOLDER / "vital_layers.json").read_text())
    num_layers = SPEC.params.depth + SPEC.params.depth_single_blocks
    assert preset["model"] == "flux-nano" and preset["source"]
    assert preset["vital_layers"] == sorted(set(preset["vital_layers"]) & set(range(num_layers)))


def test_licence_of_the_pictures_is_there():
    text = (FOLDER / "LICENSE-fluent-emoji.txt").read_text()
    assert text.startswith("MIT License") and "Copyright (c) Microsoft Corporation" in text
