"""The models that make conditions of images. They are loaded for one encoding, and freed after it."""

import torch

from flux.conditions.base import Encode
from flux.conditions.control import MapEncoder
from flux.conditions.images import Encoders
from flux.modules.image_embedders import (
    CannyImageEncoder,
    DepthImageEncoder,
    ReduxImageEncoder,
)
from flux.settings.resolved import SteeredSettings
from flux.specs import ModelSpec
from flux.weights.find import find_redux, redux_features


def image_encoders(
    spec: ModelSpec,
    settings: SteeredSettings,
    encode: Encode,
    device: torch.device,
    dtype: torch.dtype,
) -> Encoders:
    """Name the encoders of the images that steer a model.

    Args:
        spec: The model.
        settings: Where the encoders' files are.
        encode: Encodes pixels to a packed latent.
        device: Where the encoders compute.
        dtype: The dtype in which Redux's encoder computes.
    """

    def load_map() -> MapEncoder:
        if spec.control == "depth":
            return DepthImageEncoder(device, settings.depth_model)
        return CannyImageEncoder(device)

    def load_redux() -> ReduxImageEncoder:
        path = find_redux(spec, settings.redux_weights)
        sizes = redux_features(path), spec.params.context_in_dim
        return ReduxImageEncoder(device, path, *sizes, dtype, settings.siglip)

    return Encoders(encode, load_map, load_redux)
