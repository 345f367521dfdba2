"""The autoencoder computes what diffusers' computes and has the published file's names and shapes."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from flux.modules.autoencoder import AutoEncoder, AutoEncoderParams, DiagonalGaussian
from flux.specs import configs

MANIFEST = Path(__file__).parents[1] / "manifests" / "ae.json"
VARIANTS = {
    "like FLUX.1's": {},
    "like flux-nano's": {"num_res_blocks": 1, "num_groups": 8, "shift_factor": -0.0324},
}


@pytest.fixture(params=VARIANTS, scope="module")
def ae(request):
    return tiny_models.autoencoder(**VARIANTS[request.param])


@pytest.fixture(params=[(32, 32), (48, 80)], ids=str)
def image(request):
    return torch.rand(2, 3, *request.param, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode_equals_diffusers(ae, image):
    """This includes the padding of the downsampling, at the right and bottom edges only."""
    p = ae.params
    mean = tiny_models.diffusers_autoencoder(ae).encode(image).latent_dist.mean
    error = tiny_models.relative_error(ae.encode(image), p.scale_factor * (mean - p.shift_factor))
    assert error < 3e-6, f"relative error {error:.1e}"


def test_decode_equals_diffusers(ae, image):
    """Our `decode` applies scale and shift. In diffusers the pipeline does."""
    p = ae.params
    height, width = (side // 8 for side in image.shape[-2:])
    z = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(1))
    expected = tiny_models.diffusers_autoencoder(ae).decode(z / p.scale_factor + p.shift_factor).sample
    assert expected.shape == image.shape
    error = tiny_models.relative_error(ae.decode(z), expected)
    assert error < 3e-6, f"relative error {error:.1e}"


def test_forward_is_decode_after_encode(ae, image):
    assert torch.equal(ae(image), ae.decode(ae.encode(image)))


def test_full_size_has_the_names_and_shapes_of_the_published_file():
    with torch.device("meta"):
        ae = AutoEncoder(configs["flux-dev"].ae_params)
    expected = json.loads(MANIFEST.read_text())
    assert {name: list(tensor.shape) for name, tensor in ae.state_dict().items()} == expected


def test_encoding_returns_the_mean_unless_it_samples():
    moments = torch.cat((torch.full((1, 16, 8, 8), 2.0), torch.full((1, 16, 8, 8), -2.0)), dim=1)
    assert torch.equal(DiagonalGaussian(sample=False)(moments), moments[:, :16])
    torch.manual_seed(0)
    samples = torch.stack([DiagonalGaussian()(moments) for _ in range(100)])
    assert samples.mean().item() == pytest.approx(2.0, abs=0.01)
    assert samples.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.01)


def test_params_have_upstreams_fields():
    """The number of groups is an addition. Its default is the number that upstream always uses."""
    assert AutoEncoderParams(256, 3, 128, 3, [1, 2, 4, 4], 2, 16, 0.3611, 0.1159).num_groups == 32
