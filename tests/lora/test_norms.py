"""Norms of changes: equal to those of the matrices that loading adds, in every form."""

import math

import pytest
import torch
from helpers import weight_files
from helpers.lora_files import MODULES, file_of, pairs

from flux.lora.contents import open_lora
from flux.lora.norms import layer_changes
from flux.weights.checkpoint import open_checkpoint
from flux.weights.lora_places import layer_of

QKV, PROJ = "double_blocks.1.img_attn.qkv", "double_blocks.1.img_attn.proj"


def loaded_norms(base, path):
    """The norm of each layer's difference between the weights with and without the file, by layer."""
    plain, changed = weight_files.load(base), weight_files.load(base, loras=[(path, 1.0)])
    squares, of_base = {}, {}
    for (name, before), after in zip(plain.state_dict().items(), changed.state_dict().values(), strict=True):
        if not name.endswith(".bias"):
            layer = layer_of(name, 3)
            squares[layer] = squares.get(layer, 0.0) + float((after - before).square().sum())
            of_base[layer] = of_base.get(layer, 0.0) + float(before.square().sum())
    norms = {layer: math.sqrt(square) for layer, square in squares.items() if square}
    return norms, {layer: norm / math.sqrt(of_base[layer]) for layer, norm in norms.items()}


def lora(weights):
    return file_of(pairs(weights, MODULES), lambda m: m, 2.0)


def lokr(weights):
    return {
        f"{QKV}.lokr_w1": torch.randn(12, 4),
        f"{QKV}.lokr_w2_a": torch.randn(8, 2),
        f"{QKV}.lokr_w2_b": torch.randn(2, 8),
        f"{QKV}.alpha": torch.tensor(3.0),
    }


def loha(weights):
    parts = {"w1_a": (96, 2), "w1_b": (2, 32), "w2_a": (96, 2), "w2_b": (2, 32)}
    return {f"{QKV}.hada_{name}": torch.randn(shape) for name, shape in parts.items()}


def difference(weights):
    return {f"{QKV}.diff": torch.randn(96, 32), f"{PROJ}.diff_b": torch.randn(32)}


def dora(weights):
    file = file_of(pairs(weights, [QKV]), lambda m: m, 2.0)
    return {**file, f"{QKV}.dora_scale": 1 + torch.rand(96, 1)}


def oft(weights):
    return {f"{PROJ}.oft_blocks": 0.1 * torch.randn(4, 8, 8)}


def norm(weights):
    name = "double_blocks.1.img_attn.norm.query_norm"
    return {f"{name}.scale": weights[f"{name}.scale"] + 0.5}


FORMS = {"lora": lora, "lokr": lokr, "loha": loha, "difference": difference}
NEEDING_BASE = {"dora": dora, "oft": oft, "norm": norm}


@pytest.fixture
def save(weights, tmp_path):
    torch.manual_seed(0)
    return lambda form: weight_files.save(
        (FORMS | NEEDING_BASE)[form](weights), tmp_path / "lora.safetensors"
    )


@pytest.mark.parametrize("form", FORMS)
def test_without_the_base(tiny, base, save, form):
    path = save(form)
    found = {change.layer: change.norm for change in layer_changes(open_lora(path))}
    norms, _ = loaded_norms(base, path)
    assert found == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("form", [*FORMS, *NEEDING_BASE])
def test_relative_to_the_base(tiny, base, save, form):
    path = save(form)
    changes = layer_changes(open_lora(path), open_checkpoint(base))
    norms, relative = loaded_norms(base, path)
    assert {change.layer: change.norm for change in changes} == pytest.approx(norms, rel=1e-6)
    assert {change.layer: change.relative for change in changes} == pytest.approx(relative, rel=1e-6)


@pytest.mark.parametrize("form", NEEDING_BASE)
def test_unknown_without_the_base(tiny, save, form):
    [change] = layer_changes(open_lora(save(form)))
    assert change.layer == 1
    assert change.norm is None


def test_ranks_and_alphas(tiny, save):
    changes = layer_changes(open_lora(save("lora")))
    assert {(change.ranks, change.alphas) for change in changes} == {((4,), (2.0,))}
    [change] = layer_changes(open_lora(save("lokr")))
    assert (change.ranks, change.alphas) == ((2,), (3.0,))


def test_parts_of_a_fused_module(tiny, weights, base, tmp_path):
    """to_q, to_k and to_v are one module here."""
    pair = {"lora_A.weight": torch.randn(2, 32), "lora_B.weight": torch.randn(32, 2)}
    names = [f"transformer.transformer_blocks.1.attn.to_{part}" for part in "qv"]
    path = weight_files.save({f"{m}.{name}": x for m in names for name, x in pair.items()}, tmp_path / "lora")
    [change] = layer_changes(open_lora(path))
    assert change.matrices == 2
    assert change.norm == pytest.approx(loaded_norms(base, path)[0][1], rel=1e-6)
