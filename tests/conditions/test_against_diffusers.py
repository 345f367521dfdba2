"""Whole images of each kind of condition beside diffusers' pipelines: tiny random transformers, float32, and
flux-nano's autoencoder.
"""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.condition_models import REDUX_SIZES, save_redux_adapter, save_siglip
from torch.testing import assert_close

from flux.conditions import kontext
from flux.images.io import to_pil, to_tensor, to_uint8
from flux.modules.image_embedders import CannyImageEncoder, ReduxImageEncoder
from flux.sampling import (
    denoise,
    get_noise,
    get_schedule,
    pack,
    prepare_control,
    prepare_fill,
    prepare_kontext,
    prepare_redux,
    unpack,
)

STEPS = 3
SIZE = {"width": 96, "height": 64}


@pytest.fixture
def peer(ae, texts):
    """Makes a pipeline of diffusers of the same models, which encodes images to the mean as upstream does."""

    def make(name: str, model):
        vae = tiny_models.diffusers_autoencoder(ae)
        encode = vae.encode

        def encode_to_mean(x):
            mean = encode(x).latent_dist.mode()
            always = SimpleNamespace(mode=lambda: mean, sample=lambda generator: mean)
            return SimpleNamespace(latent_dist=always)

        vae.encode = encode_to_mean
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        without = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        transformer = tiny_models.diffusers_transformer(model)
        pipe = getattr(diffusers, name)(scheduler, vae, transformer=transformer, **without)
        pipe.set_progress_bar_config(disable=True)

        def run(noise, **given):
            features = {"prompt_embeds": texts.txt, "pooled_prompt_embeds": texts.vec}
            fixed = {"num_inference_steps": STEPS, "latents": noise, "output_type": "np"}
            return pipe(**fixed, **features | given).images[0]

        return run

    return make


def ours(ae, model, given, guidance: float, width: int, height: int) -> np.ndarray:
    levels = get_schedule(STEPS, given["img"].shape[1])
    latent = denoise(model, **given, timesteps=levels, guidance=guidance)
    return to_uint8(ae.decode(unpack(latent, height, width)))[0].astype(int)


def assert_same_image(found: np.ndarray, expected: np.ndarray) -> None:
    levels = (expected * 255).round().astype(int)
    assert levels.std() > 10
    assert abs(found - levels).max() <= 1


@torch.no_grad()
def test_fill(ae, texts, peer, image, mask):
    model, noise = tiny_models.flux(in_channels=384), get_noise(1, 64, 96, "cpu", torch.float32, seed=1)
    theirs = peer("FluxFillPipeline", model)
    expected = theirs(pack(noise), image=image, mask_image=mask, guidance_scale=30.0, **SIZE)
    given = prepare_fill(texts.t5, texts.clip, noise, "", ae, image, mask)
    assert_same_image(ours(ae, model, given, 30.0, 96, 64), expected)


@torch.no_grad()
@pytest.mark.parametrize("encoder", [None, CannyImageEncoder("cpu")], ids=["a finished map", "Canny"])
def test_control(ae, texts, peer, image, encoder):
    model, noise = tiny_models.flux(in_channels=128), get_noise(1, 64, 96, "cpu", torch.float32, seed=1)
    finished = to_pil(encoder(to_tensor(image)[None])[0]) if encoder else image
    theirs = peer("FluxControlPipeline", model)
    expected = theirs(pack(noise), control_image=finished, guidance_scale=10.0, **SIZE)
    given = prepare_control(texts.t5, texts.clip, noise, "", ae, encoder, image)
    assert_same_image(ours(ae, model, given, 10.0, 96, 64), expected)


@torch.no_grad()
def test_kontext(ae, texts, peer, encode, image, monkeypatch):
    """The context has another size than the image to make."""
    monkeypatch.setattr(kontext, "PREFERED_KONTEXT_RESOLUTIONS", ((64, 64), (112, 80)))
    model = tiny_models.flux()
    given, height, width = prepare_kontext(texts.t5, texts.clip, "", ae, image, 1, "cpu", 96, 64)
    assert (width, height) == (96, 64)
    given = {name: x.float() for name, x in given.items()}
    exact = kontext.kontext_condition(encode, image)
    assert_close(given["img_cond_seq"], exact.context, rtol=2**-8, atol=0)
    given["img_cond_seq"] = exact.context
    theirs = peer("FluxKontextPipeline", model)
    expected = theirs(
        given["img"],
        image=image.resize((112, 80), 1),
        guidance_scale=2.5,
        max_area=96 * 64,
        _auto_resize=False,
        **SIZE,
    )
    assert_same_image(ours(ae, model, given, 2.5, 96, 64), expected)


@torch.no_grad()
def test_redux(ae, texts, image, tmp_path, peer):
    """The prior's text tokens beside ours, and the whole image that they steer."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder as Embedder
    from safetensors.torch import load_file
    from transformers import AutoImageProcessor, SiglipVisionModel

    adapter, siglip = save_redux_adapter(tmp_path / "redux.safetensors"), save_siglip(tmp_path / "siglip")
    embedder = Embedder(*REDUX_SIZES)
    embedder.load_state_dict(load_file(adapter))
    prior = diffusers.FluxPriorReduxPipeline(
        SiglipVisionModel.from_pretrained(siglip, dtype=torch.float32),
        AutoImageProcessor.from_pretrained(siglip, backend="pil"),
        embedder,
    )
    # It takes features of texts only where there is a text encoder.
    prior.text_encoder = SimpleNamespace(dtype=torch.float32)
    expected = prior(image, prompt_embeds=texts.txt, pooled_prompt_embeds=texts.vec).prompt_embeds
    encoder = ReduxImageEncoder("cpu", adapter, *REDUX_SIZES, torch.float32, siglip)
    model, noise = tiny_models.flux(), get_noise(1, 64, 96, "cpu", torch.float32, seed=1)
    given = prepare_redux(texts.t5, texts.clip, noise, "", encoder, image)
    assert tiny_models.relative_error(given["txt"], expected) < 1e-6
    assert given["txt_ids"].shape == (1, 5 + 9, 3)
    theirs = peer("FluxPipeline", model)
    expected = theirs(pack(noise), prompt_embeds=expected, guidance_scale=2.5, **SIZE)
    assert_same_image(ours(ae, model, given, 2.5, 96, 64), expected)
