"""The path between noise and latent: start noise, packing, schedule, Euler steps, guidance.

Upstream's `prepare_control`, `prepare_fill`, `prepare_kontext` and `prepare_redux` can be imported from here
too. They are read from `flux.conditions`, a higher floor, when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flux.model import VelocityModel
from flux.sampling.conditioning import Conditioning, Modulations
from flux.sampling.context import ContextReuse
from flux.sampling.guidance import ONE_BATCH, Passes, guided, in_one_batch
from flux.sampling.latents import get_noise, image_ids, latent_size, pack, prepare, unpack
from flux.sampling.schedule import get_lin_function, get_schedule, step_at, time_shift, window
from flux.sampling.steps import Step, denoise, euler_step, model_inputs, sample, streams

if TYPE_CHECKING:
    from flux.conditions.control import prepare_control
    from flux.conditions.fill import prepare_fill
    from flux.conditions.kontext import prepare_kontext
    from flux.conditions.redux import prepare_redux

__all__ = [
    "ONE_BATCH",
    "Conditioning",
    "ContextReuse",
    "Modulations",
    "Passes",
    "Step",
    "VelocityModel",
    "denoise",
    "euler_step",
    "get_lin_function",
    "get_noise",
    "get_schedule",
    "guided",
    "image_ids",
    "in_one_batch",
    "latent_size",
    "model_inputs",
    "pack",
    "prepare",
    "prepare_control",
    "prepare_fill",
    "prepare_kontext",
    "prepare_redux",
    "sample",
    "step_at",
    "streams",
    "time_shift",
    "unpack",
    "window",
]


def __getattr__(name: str) -> object:
    prefix, _, kind = name.partition("_")
    if prefix == "prepare" and name in __all__:
        return getattr(import_module(f"flux.conditions.{kind}"), name)
    raise AttributeError(f"module 'flux.sampling' has no attribute {name!r}")
