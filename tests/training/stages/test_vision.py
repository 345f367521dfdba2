"""The perceptual encoder."""

import torch

from training.loop.models import DINO_SIDE
from training.stages.vision import normalized


def test_the_perceptual_encoder_loads_as_the_package_loads_it(work):
    """Images are prepared as in training: scaled to the encoder's square, whatever their shape."""
    from PIL import Image

    from flux.metrics.features import PerceptualEncoder

    encoder = PerceptualEncoder.load(work.folder / "assets" / "dinov2")
    images = [Image.new("RGB", (96, 64), colour) for colour in ("red", "blue")]
    features = encoder.embed(images)
    assert features.shape == (2, work.sizes.dino_width)
    pixels = encoder.processor(images, return_tensors="pt")["pixel_values"]
    flat = torch.tensor((1.0, 0.0, 0.0)).view(1, 3, 1, 1).expand(1, 3, DINO_SIDE, DINO_SIDE)
    torch.testing.assert_close(pixels[:1], normalized(flat))
