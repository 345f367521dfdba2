"""The metrics that compare features: each against its definition, and whatever cannot be loaded."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.images import noise
from PIL import Image

from flux.errors import InputError
from flux.metrics.features import Clip, Dino, Lpips
from flux.specs import configs


def test_dino_is_the_cosine_and_embeds_a_reference_once(monkeypatch):
    metric = Dino.load(configs["flux-nano"].dinov2)
    reference, *others = (noise(seed=seed) for seed in range(3))
    features = metric.encoder.embed([reference, *others])
    embed, embedded = metric.encoder.embed, []
    monkeypatch.setattr(metric.encoder, "embed", lambda images: embedded.extend(images) or embed(images))
    values = metric.compare([reference] * 3, [*others, reference])
    assert values == pytest.approx([*(features[1:] @ features[0]).tolist(), 1], abs=1e-5)
    assert len(embedded) == 3


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP vision model of random weights."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    sides = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(folder)
    return folder


def test_clip_is_the_cosine_of_its_image_embeddings(clip_folder):
    """At the model's own size nothing is resized, so the preparation is one line."""
    from transformers import CLIPVisionModelWithProjection

    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    model = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    images = [noise(32, 32, seed) for seed in range(3)]
    pixels = np.stack([(np.asarray(image) / 255 - mean) / std for image in images])
    pixels = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
    a, *others = model(pixel_values=pixels).image_embeds
    expected = [torch.cosine_similarity(a, b, dim=0).item() for b in others]
    values = Clip.load(str(clip_folder)).compare([images[0]] * 2, images[1:])
    assert values == pytest.approx(expected, abs=1e-5)


def test_a_clip_that_is_not_whole_is_refused(clip_folder, tmp_path):
    """transformers would fill the projection with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"no whole CLIP vision model: visual_projection.weight is missing"):
        Clip.load(str(tmp_path / "clip"))
    with pytest.raises(InputError, match=r"no whole CLIP vision model"):
        Clip.load(str(configs["flux-nano"].dinov2))
    with pytest.raises(InputError, match=r"a folder without a whole CLIP vision model"):
        Clip.load(str(tmp_path))


def test_a_clip_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match=r"nobody/nothing.*the hub did not give it: give a folder"):
        Clip.load("nobody/nothing")


def test_lpips_is_turned_into_a_similarity(monkeypatch):
    """The package's net takes -1..1 and hands back a distance for each row, "B 1 1 1"."""

    class Net(torch.nn.Module):
        def forward(self, a, b):
            assert a.min() == -1
            assert a.max() == 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True) / 4

    def make(net, verbose):
        assert net == "alex"
        return Net()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=make))
    half = Image.new("RGB", (16, 16))
    half.paste("white", (0, 0, 16, 8))
    values = Lpips.load().compare([half, half], [half, half.rotate(180)])
    assert values == pytest.approx([1, 0.5])
    assert Lpips.change(np.array(values)) == pytest.approx([0, 0.5])


def test_lpips_without_its_package_or_weights(monkeypatch):
    def offline(**_):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"pip install lpips"):
        Lpips.load()
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=offline))
    with pytest.raises(InputError, match=r"no route to host.*put alexnet-owt-7be5be79.pth into"):
        Lpips.load()
