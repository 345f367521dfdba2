"""The autoencoder's scale."""

import math
from dataclasses import replace

import pytest
import torch

from flux.modules.autoencoder import AutoEncoder
from training.loop.models import TOY
from training.stages.autoencoder import fold_scale


def test_folding_the_scale_keeps_the_images():
    """Latents come out at unit normal; away from the borders, where padding differs, nothing else changes."""
    params = replace(TOY.ae, num_groups=4)
    ae = AutoEncoder(params).requires_grad_(False)
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    before = ae.encoder(images)
    mean, spread = before.chunk(2, dim=1)[0].mean().item(), before.chunk(2, dim=1)[0].std().item()
    stem = ae.decoder.conv_in(before.chunk(2, dim=1)[0])
    fold_scale(dict(ae.named_parameters()), mean, spread, ae.scale_factor, ae.shift_factor)
    after, log_variance = ae.encoder(images).chunk(2, dim=1)
    unit = ae.scale_factor * (after - ae.shift_factor)
    assert unit.mean().item() == pytest.approx(0, abs=1e-4)
    assert unit.std().item() == pytest.approx(1, abs=1e-4)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(ae.decoder.conv_in(after)[inner], stem[inner], atol=1e-4, rtol=1e-4)
    ratio = 2 * math.log(spread * ae.scale_factor)
    torch.testing.assert_close(log_variance, before.chunk(2, dim=1)[1] - ratio, atol=1e-4, rtol=1e-4)
