"""The perceptual encoder against transformers' own model, and as a measure of how alike pictures are."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from flux.errors import InputError
from flux.metrics.features import PerceptualEncoder, similarity
from flux.specs import configs

FOLDER = configs["flux-nano"].dinov2
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def scene(side: int = 256, colour: str = "orange", left: float = 0.5) -> Image.Image:
    """A ball on a lawn."""
    image = Image.new("RGB", (side, side), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, side // 2, side, side), fill="forestgreen")
    middle, radius = left * side, side / 5
    draw.ellipse((middle - radius, side * 0.4, middle + radius, side * 0.4 + 2 * radius), fill=colour)
    return image


def with_noise(image: Image.Image, strength: float) -> Image.Image:
    pixels = np.asarray(image) + 255 * strength * np.random.default_rng(0).standard_normal((*image.size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def encoder() -> PerceptualEncoder:
    return PerceptualEncoder.load(FOLDER)


def test_equals_the_model_on_pixels_prepared_by_hand(encoder):
    """At the model's own size nothing is resized or cropped, so the preparation is one line."""
    from transformers import Dinov2Model

    image = scene(128)
    pixels = (torch.from_numpy(np.array(image)) / 255 - MEAN) / STD
    model = Dinov2Model.from_pretrained(FOLDER, dtype=torch.float32).eval()
    streams = model(pixel_values=pixels.permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
    class_token = model.layernorm(streams[-1])[0, 0]
    torch.testing.assert_close(
        encoder.embed([image])[0], class_token / class_token.norm(), atol=1e-5, rtol=1e-5
    )


def test_resizes_as_pillow_does(encoder):
    """The shorter side to 128 with Pillow's bicubic filter, then the middle square."""
    wide = Image.new("RGB", (512, 256))
    wide.paste(scene(256), (0, 0))
    wide.paste(scene(256, "purple"), (256, 0))
    by_hand = wide.resize((256, 128), Image.Resampling.BICUBIC).crop((64, 0, 192, 128))
    torch.testing.assert_close(encoder.embed([wide]), encoder.embed([by_hand]), atol=1e-5, rtol=1e-5)


def test_deterministic_and_one_for_the_same_picture(encoder):
    images = [scene(), scene(colour="purple"), scene()]
    features = encoder.embed(images)
    assert features.shape == (3, encoder.model.config.hidden_size)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert torch.equal(features, encoder.embed(images))
    same, other = similarity(features[[0, 0]], features[[2, 1]])
    assert same == pytest.approx(1, abs=1e-6)
    assert other < 0.99


def test_batches_do_not_mix(encoder):
    images = [scene(colour=colour, left=left) for colour in ("red", "purple") for left in (0.3, 0.5, 0.7)]
    torch.testing.assert_close(
        encoder.embed(images, batch_size=4), encoder.embed(images), atol=1e-5, rtol=1e-5
    )
    assert encoder.embed([]).shape == (0, encoder.model.config.hidden_size)


def test_stronger_damage_scores_lower(encoder):
    clean = scene()
    damaged = [with_noise(clean, strength) for strength in (0, 0.1, 0.2, 0.4, 0.8)]
    features = encoder.embed([clean, *damaged])
    scores = similarity(features[:1].expand(5, -1), features[1:])
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert (scores.diff() < 0).all(), scores
    assert scores[-1] < 0.9


def test_any_mode_of_picture(encoder):
    """Pictures with transparency or one channel are read as RGB."""
    expected = encoder.embed([scene()])
    torch.testing.assert_close(encoder.embed([scene().convert("RGBA")]), expected, atol=1e-5, rtol=1e-5)
    assert encoder.embed([scene().convert("L")]).shape == expected.shape


def test_similarity_is_the_cosine():
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(similarity(a, b), (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1))


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no-such-folder.* no folder here"):
        PerceptualEncoder.load(tmp_path / "no-such-folder")
    with pytest.raises(InputError, match=r"nobody/nothing.* hub did not give it"):
        PerceptualEncoder.load("nobody/nothing")
    with pytest.raises(InputError, match="without a whole DINOv2"):
        PerceptualEncoder.load(tmp_path)

    cut = tmp_path / "cut"
    shutil.copytree(FOLDER, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="without a whole DINOv2"):
        PerceptualEncoder.load(cut)

    config = json.loads((cut / "config.json").read_text()) | {"model_type": "vit"}
    (cut / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="which is a vit"):
        PerceptualEncoder.load(cut)
