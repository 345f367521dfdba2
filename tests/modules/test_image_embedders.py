"""Encoders of conditions, beside OpenCV's, transformers' and diffusers' own."""

import sys

import cv2
import numpy as np
import pytest
import torch
from helpers.condition_models import REDUX_SIZES, save_depth_model, save_redux_adapter, save_siglip
from helpers.tiny_models import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from flux.errors import InputError
from flux.images.io import to_tensor
from flux.modules.image_embedders import CannyImageEncoder, DepthImageEncoder, ReduxImageEncoder


def image(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Blocks of colours, in which there are edges."""
    levels = np.random.default_rng(seed).integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.NEAREST)


# ---- edges


@pytest.mark.parametrize("thresholds", [(50, 200), (20, 60)])
def test_edges_are_opencvs(thresholds):
    images = [image(seed=0), image(seed=1)]
    maps = CannyImageEncoder("cpu", *thresholds)(torch.stack([to_tensor(each) for each in images]))
    assert maps.shape == (2, 3, 48, 64)
    for each, found in zip(images, maps):
        edges = cv2.Canny(np.array(each), *thresholds)
        assert 0 < edges.mean() < 255
        for channel in found:
            assert np.array_equal((channel.numpy() + 1) * 127.5, edges)


def test_without_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="pip install opencv-python-headless"):
        CannyImageEncoder("cpu")


# ---- depth


def test_depth_is_that_of_transformers(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = save_depth_model(tmp_path)
    found = DepthImageEncoder("cpu", folder)(to_tensor(image())[None])

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForDepthEstimation.from_pretrained(folder)
    with torch.no_grad():
        nearness = model(**processor(image(), return_tensors="pt")).predicted_depth
    scaled = F.interpolate(nearness[:, None], (48, 64), mode="bicubic", antialias=True)
    assert nearness.std() > 0
    assert found.shape == (1, 3, 48, 64)
    assert torch.equal(found, (scaled / 127.5 - 1).expand(1, 3, 48, 64))


def test_a_folder_without_a_depth_model(tmp_path):
    with pytest.raises(InputError, match="as the depth model, which is a folder without a whole one"):
        DepthImageEncoder("cpu", tmp_path)


# ---- Redux


@pytest.fixture
def files(tmp_path):
    """The adapter and the SigLIP."""
    return save_redux_adapter(tmp_path / "redux.safetensors"), save_siglip(tmp_path / "siglip")


def test_redux_beside_diffusers(files):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder as Peer
    from transformers import AutoImageProcessor, SiglipVisionModel

    adapter, siglip = files
    images = [image(seed=0), image(40, 80, seed=1)]
    encoder = ReduxImageEncoder("cpu", adapter, *REDUX_SIZES, torch.float32, siglip)
    found = encoder(images)

    peer = Peer(*REDUX_SIZES)
    peer.load_state_dict(load_file(adapter))
    processor = AutoImageProcessor.from_pretrained(siglip, backend="pil")
    with torch.no_grad():
        vision = SiglipVisionModel.from_pretrained(siglip, dtype=torch.float32)
        features = vision(**processor(images, return_tensors="pt")).last_hidden_state
        expected = peer(features).image_embeds
    assert found.shape == expected.shape == (2, 9, REDUX_SIZES[1])
    assert relative_error(found, expected) < 1e-6
    assert relative_error(encoder(images[1]), expected[1:]) < 1e-6


@pytest.mark.parametrize(("sizes", "expected"), [((), 4096), ((REDUX_SIZES[0], 24), 24)])
def test_an_adapter_of_other_sizes(files, sizes, expected):
    """Without sizes, the published ones are expected: T5's features are 4096."""
    adapter, siglip = files
    with pytest.raises(InputError, match=rf"redux_down\.bias is \(20,\): expected \({expected},\)"):
        ReduxImageEncoder("cpu", adapter, *sizes, siglip=siglip)


def test_a_siglip_of_other_sizes(tmp_path, files):
    adapter = save_redux_adapter(tmp_path / "other.safetensors", (12, 20))
    with pytest.raises(InputError, match="which has 16 features: the adapter takes 12"):
        ReduxImageEncoder("cpu", adapter, 12, 20, torch.float32, files[1])


def test_a_file_that_is_no_adapter(files, tmp_path):
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"whose other is \(1,\): expected no such tensor"):
        ReduxImageEncoder("cpu", tmp_path / "other.safetensors", *REDUX_SIZES, torch.float32, files[1])
    with pytest.raises(InputError, match="as the Redux adapter, which cannot be read"):
        ReduxImageEncoder("cpu", tmp_path / "none.safetensors")
