"""The path between noise and latent: start noise, packing, schedule, Euler steps, guidance."""

from flux.model import VelocityModel
from flux.sampling.conditioning import Conditioning, Modulations
from flux.sampling.guidance import ONE_BATCH, Passes, guided, in_one_batch
from flux.sampling.latents import get_noise, image_ids, latent_size, pack, prepare, unpack
from flux.sampling.schedule import get_lin_function, get_schedule, step_at, time_shift, window
from flux.sampling.steps import Step, denoise, euler_step, model_inputs, sample, streams

__all__ = [
    "ONE_BATCH",
    "Conditioning",
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
    "sample",
    "step_at",
    "streams",
    "time_shift",
    "unpack",
    "window",
]
