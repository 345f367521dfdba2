"""Upstream's import path. Everything here lives elsewhere."""

from flux.cli import save_sample as save_image
from flux.images.watermark import embed_watermark
from flux.specs import ModelSpec, configs
from flux.usage import track_usage_via_api
from flux.weights.load import load_ae, load_clip, load_flow_model, load_t5

__all__ = [
    "ModelSpec",
    "configs",
    "embed_watermark",
    "load_ae",
    "load_clip",
    "load_flow_model",
    "load_t5",
    "save_image",
    "track_usage_via_api",
]
