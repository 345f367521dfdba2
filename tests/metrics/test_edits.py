"""The measures of edits, against definitions written out."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.images import noise
from PIL import Image

from flux.errors import InputError
from flux.metrics.edits import ClipText, EditMetrics, MeasuredEdit, Structure
from flux.metrics.pixels import MAX_PSNR, Ssim
from flux.specs import configs


def left_half(side: int = 32) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[:, : side // 2] = True
    return mask


def an_edit(before=None, after=None, mask=None, source="a cat", target="a dog") -> MeasuredEdit:
    return MeasuredEdit(before or noise(32, 32), after or noise(32, 32, seed=1), mask, source, target)


def test_outside_the_mask_by_hand():
    """A tenth of the range off everywhere: only the right half counts, and to PIE-Bench half of it does."""
    before, after = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), (51, 0, 0))
    [scores] = EditMetrics().measure([an_edit(before, after, left_half())])
    mse = 0.2**2 / 3
    assert scores["mse"] == pytest.approx(mse)
    assert scores["psnr"] == pytest.approx(-10 * np.log10(mse))
    assert scores["pie_mse"] == pytest.approx(mse / 2)
    assert scores["pie_psnr"] == pytest.approx(-10 * np.log10(mse / 2))


def test_what_changes_inside_does_not_count():
    before = noise(32, 32)
    pixels = np.array(before)
    pixels[:, :16] = 7
    [scores] = EditMetrics().measure([an_edit(before, Image.fromarray(pixels), left_half())])
    assert scores["psnr"] == scores["pie_psnr"] == MAX_PSNR
    assert scores["mse"] == 0
    assert scores["ssim"] == pytest.approx(1)


def test_ssim_is_that_of_blackened_pictures():
    edit = an_edit(mask=left_half())
    dark = []
    for picture in (edit.before, edit.after):
        pixels = np.array(picture)
        pixels[:, :16] = 0
        dark.append(Image.fromarray(pixels))
    [scores] = EditMetrics().measure([edit])
    assert scores["ssim"] == pytest.approx(Ssim().compare(dark[:1], dark[1:])[0])


def test_no_outside_no_score():
    for mask in (None, np.ones((32, 32), dtype=bool)):
        scores = EditMetrics().measure([an_edit(mask=mask), an_edit(mask=left_half())])
        assert set(scores[0].values()) == {None}
        assert None not in scores[1].values()


# ---- structure


@pytest.fixture(scope="module")
def dino_v1(tmp_path_factory):
    """A DINO of the first kind, which is a ViT, of random weights."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def last_keys(model, pixels):
    """The keys of the last layer from what enters it, by its norm and its projection."""
    into = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    layer = (model.layers if hasattr(model, "layers") else model.encoder.layer)[-1]
    norm = layer.layernorm_before if hasattr(layer, "layernorm_before") else layer.norm1
    return layer.attention.k_proj(norm(into))


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_structure_is_the_distance_of_self_similarities(kind, dino_v1):
    structure = Structure.load(str(configs["flux-nano"].dinov2) if kind == "dinov2" else dino_v1)
    edits = [an_edit(noise(128, 128, seed), noise(128, 128, seed + 2)) for seed in range(2)]
    expected = []
    for edit in edits:
        maps = []
        for picture in (edit.before, edit.after):
            pixels = structure.processor([picture], return_tensors="pt")["pixel_values"]
            [keys] = last_keys(structure.model, pixels)
            unit = keys / keys.norm(dim=-1, keepdim=True)
            maps.append(unit @ unit.T)
        expected.append(float((maps[0] - maps[1]).square().mean()))
    assert structure.distances(edits) == pytest.approx(expected, rel=1e-4)
    same = noise(128, 128)
    assert structure.distances([an_edit(same, same)]) == [0]


def test_structure_of_what_is_no_dino(tmp_path):
    with pytest.raises(InputError, match="folder without a whole DINO"):
        Structure.load(str(tmp_path))
    with pytest.raises(InputError, match="no folder here"):
        Structure.load("nobody/nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="which is a bert"):
        Structure.load(str(tmp_path))


# ---- LPIPS and CLIP


def test_lpips_sees_blackened_pictures(monkeypatch):
    """Its distance, on SqueezeNet, of what is outside the mask."""
    made = {}

    class Net(torch.nn.Module):
        def forward(self, a, b):
            made["seen"] = (a, b)
            return (a - b).abs().mean()

    def make(net, verbose):
        made["net"] = net
        return Net()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=make))
    metrics = EditMetrics.load(["lpips"], "", "")
    scores = metrics.measure([an_edit(), an_edit(mask=left_half())])
    assert made["net"] == "squeeze"
    assert all((side[..., :16] == -1).all() and (side[..., 16:] != -1).any() for side in made["seen"])
    assert scores[0]["lpips"] is None
    a, b = made["seen"]
    assert scores[1]["lpips"] == pytest.approx(float((a - b).abs().mean()), abs=1e-6)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights with flux-nano's tokenizer."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(configs["flux-nano"].folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(tokenizer),
        "projection_dim": 16,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return str(folder)


def test_clip_scores_are_those_of_the_whole_model(clip_folder):
    """Against transformers' CLIPModel, which has text and pictures in one."""
    from transformers import CLIPModel, CLIPTokenizer

    edits = [an_edit(), an_edit(mask=left_half(), target="a red car on the street")]
    scores = ClipText.load(clip_folder).measure(edits)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    processor = ClipText.load(clip_folder).vision.processor

    def of(picture, prompt):
        pixels = processor([picture], return_tensors="pt")["pixel_values"]
        out = model(pixel_values=pixels, **tokenizer([prompt], return_tensors="pt"))
        return out.image_embeds[0], out.text_embeds[0]

    for edit, found in zip(edits, scores):
        before, source = of(edit.before, edit.source)
        after, target = of(edit.after, edit.target)
        assert found["clip"] == pytest.approx(100 * float(after @ target), abs=1e-3)
        moved, meant = after - before, target - source
        direction = float(moved @ meant / (moved.norm() * meant.norm()))
        assert found["clip_direction"] == pytest.approx(direction, abs=1e-3)
    assert scores[0]["clip_edited"] is None
    pixels = np.array(edits[1].after)
    pixels[:, 16:] = 0
    part, target = of(Image.fromarray(pixels), edits[1].target)
    assert scores[1]["clip_edited"] == pytest.approx(100 * float(part @ target), abs=1e-3)


def test_clip_without_its_texts(clip_folder, tmp_path):
    with pytest.raises(InputError, match="clip"):
        ClipText.load(str(tmp_path))
