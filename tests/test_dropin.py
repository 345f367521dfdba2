"""Imports and calls of programs written for upstream's package, with its order and names of arguments."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux.specs import configs

NAMES = {
    "flux.model": "Flux FluxParams FluxLoraWrapper",
    "flux.modules.lora": "LinearLora replace_linear_with_lora",
    "flux.content_filters": "PixtralContentFilter",
    "flux.math": "attention rope apply_rope",
    "flux.modules.layers": (
        "DoubleStreamBlock SingleStreamBlock EmbedND LastLayer MLPEmbedder Modulation ModulationOut QKNorm "
        "RMSNorm SelfAttention timestep_embedding"
    ),
    "flux.modules.autoencoder": (
        "AutoEncoder AutoEncoderParams Encoder Decoder DiagonalGaussian AttnBlock ResnetBlock Downsample "
        "Upsample"
    ),
    "flux.modules.conditioner": "HFEmbedder",
    "flux.sampling": (
        "get_noise prepare prepare_control prepare_fill prepare_redux prepare_kontext get_schedule denoise "
        "unpack time_shift get_lin_function"
    ),
    "flux.util": (
        "configs load_flow_model load_ae load_t5 load_clip embed_watermark save_image track_usage_via_api "
        "ModelSpec ensure_hf_auth prompt_for_hf_auth get_checkpoint_path aspect_ratio_to_height_width "
        "PREFERED_KONTEXT_RESOLUTIONS print_load_warning optionally_expand_state_dict WatermarkEmbedder "
        "WATERMARK_MESSAGE WATERMARK_BITS CHECKPOINTS_DIR BFL_API_KEY"
    ),
    "flux.cli": "SamplingOptions main app",
    "flux.cli_control": "SamplingOptions main",
    "flux.cli_fill": "SamplingOptions main",
    "flux.cli_kontext": "SamplingOptions main",
    "flux.cli_redux": "SamplingOptions main",
}


@pytest.mark.parametrize("module", NAMES)
def test_import_paths(module):
    missing = [name for name in NAMES[module].split() if not hasattr(importlib.import_module(module), name)]
    assert not missing


# The first parameters, in upstream's order; what follows them is ours.
SIGNATURES = {
    "flux.model:Flux.forward": "self img img_ids txt txt_ids timesteps y guidance",
    "flux.model:FluxLoraWrapper": "lora_rank lora_scale",
    "flux.modules.lora:LinearLora": "in_features out_features bias rank dtype device lora_bias scale",
    "flux.modules.lora:replace_linear_with_lora": "module max_rank scale",
    "flux.content_filters:PixtralContentFilter": "device nsfw_threshold",
    "flux.modules.layers:DoubleStreamBlock": "hidden_size num_heads mlp_ratio qkv_bias",
    "flux.modules.layers:DoubleStreamBlock.forward": "self img txt vec pe",
    "flux.modules.layers:SingleStreamBlock": "hidden_size num_heads mlp_ratio qk_scale",
    "flux.modules.layers:SingleStreamBlock.forward": "self x vec pe",
    "flux.modules.layers:timestep_embedding": "t dim max_period time_factor",
    "flux.modules.autoencoder:AutoEncoder": "params sample_z",
    "flux.modules.conditioner:HFEmbedder": "version max_length",
    "flux.sampling:get_noise": "num_samples height width device dtype seed",
    "flux.sampling:prepare": "t5 clip img prompt",
    "flux.sampling:get_schedule": "num_steps image_seq_len base_shift max_shift shift",
    "flux.sampling:denoise": (
        "model img img_ids txt txt_ids vec timesteps guidance img_cond img_cond_seq img_cond_seq_ids"
    ),
    "flux.sampling:prepare_control": "t5 clip img prompt ae encoder img_cond_path",
    "flux.sampling:prepare_fill": "t5 clip img prompt ae img_cond_path mask_path",
    "flux.sampling:prepare_redux": "t5 clip img prompt encoder img_cond_path",
    "flux.sampling:prepare_kontext": (
        "t5 clip prompt ae img_cond_path seed device target_width target_height bs"
    ),
    "flux.sampling:unpack": "x height width",
    "flux.util:load_flow_model": "name device",
    "flux.util:load_ae": "name device",
    "flux.util:load_t5": "device max_length",
    "flux.util:load_clip": "device",
    "flux.util:get_checkpoint_path": "repo_id filename env_var",
    "flux.util:aspect_ratio_to_height_width": "aspect_ratio area",
    "flux.util:print_load_warning": "missing unexpected",
    "flux.util:optionally_expand_state_dict": "model state_dict",
    "flux.util:WatermarkEmbedder": "watermark",
    "flux.util:save_image": "nsfw_classifier name output_name idx x add_sampling_metadata prompt",
    "flux.util:track_usage_via_api": "name n",
    "flux.cli:main": "name width height seed prompt device num_steps loop guidance offload output_dir "
    "add_sampling_metadata",
    "flux.cli:SamplingOptions": "prompt width height num_steps guidance seed",
}


@pytest.mark.parametrize("path", SIGNATURES)
def test_first_parameters(path):
    """By position as by name: upstream's programs do both."""
    expected = SIGNATURES[path].split()
    assert list(inspect.signature(pkgutil.resolve_name(path)).parameters)[: len(expected)] == expected


# Fields of dataclasses, in upstream's order; what follows them is ours.
FIELDS = {
    "flux.model:FluxParams": (
        "in_channels out_channels vec_in_dim context_in_dim hidden_size mlp_ratio num_heads depth "
        "depth_single_blocks axes_dim theta qkv_bias guidance_embed"
    ),
    "flux.modules.autoencoder:AutoEncoderParams": (
        "resolution in_channels ch out_ch ch_mult num_res_blocks z_channels scale_factor shift_factor"
    ),
}


@pytest.mark.parametrize("path", FIELDS)
def test_params_in_upstreams_order(path):
    expected = FIELDS[path].split()
    assert [field.name for field in fields(pkgutil.resolve_name(path))][: len(expected)] == expected


def test_blocks_called_as_upstream_calls_them():
    """By keyword, without anything of ours."""
    from flux.modules.layers import DoubleStreamBlock, EmbedND, SingleStreamBlock

    pe = EmbedND(dim=16, theta=10_000, axes_dim=[4, 6, 6])(torch.zeros(1, 9, 3))
    img, txt, vec = torch.randn(1, 6, 32), torch.randn(1, 3, 32), torch.randn(1, 32)
    double = DoubleStreamBlock(32, 2, mlp_ratio=4.0, qkv_bias=True)
    img, txt = double(img=img, txt=txt, vec=vec, pe=pe)
    x = SingleStreamBlock(32, 2, mlp_ratio=4.0)(torch.cat((txt, img), 1), vec=vec, pe=pe)
    assert x.shape == (1, 9, 32)


@pytest.fixture
def small_dev(monkeypatch):
    """The small model under the name that upstream's programs ask for."""
    monkeypatch.setitem(configs, "flux-dev", configs["flux-nano"])


def test_a_program_written_for_upstream(small_dev, nano, tmp_path):
    """Its calls in its order, the image written by its `save_image`; equal to our own pipeline's."""
    from flux.sampling import denoise, get_noise, get_schedule, prepare, unpack
    from flux.util import embed_watermark, load_ae, load_clip, load_flow_model, load_t5, save_image

    width, height, prompt = 128, 96, "a dog on the grass"
    device = torch.device("cpu")
    t5, clip = load_t5(device, max_length=32), load_clip(device)
    model, ae = load_flow_model("flux-dev", device=device), load_ae("flux-dev", device=device)
    noise = get_noise(1, height, width, device=device, dtype=torch.bfloat16, seed=3)
    given = prepare(t5, clip, noise, prompt=prompt)
    levels = get_schedule(3, given["img"].shape[1], shift=False)
    x = denoise(model, **given, timesteps=levels, guidance=3.5)
    x = unpack(x.float(), height, width)
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
        x = ae.decode(x)
    index = save_image(None, "flux-dev", str(tmp_path / "img_{idx}.jpg"), 4, x, True, prompt)

    assert index == 5
    with Image.open(tmp_path / "img_4.jpg") as written:
        assert written.size == (width, height)
        assert prompt in str(written.getexif()[0x010E])
        image = np.asarray(written.convert("RGB"), dtype=float)
    assert image.std() > 20
    marked = embed_watermark(x.float().clamp(-1, 1))
    assert marked.shape == x.shape
    assert (marked - x.clamp(-1, 1)).abs().max() < 0.5
    stacked = embed_watermark(x.float().clamp(-1, 1)[None])
    assert torch.equal(stacked[0], marked)


def test_an_image_that_the_classifier_refuses_is_not_saved(tmp_path):
    from flux.util import save_image

    x = torch.zeros(1, 3, 256, 256)

    def unsafe(image):
        return [{"label": "nsfw", "score": 0.99}, {"label": "normal", "score": 0.01}]

    assert save_image(unsafe, "flux-dev", str(tmp_path / "img_{idx}.jpg"), 0, x, False, "a dog") == 0
    assert not list(tmp_path.iterdir())


def test_weights_are_read_when_asked_for(monkeypatch, tmp_path):
    """Upstream reads its variables at import; programs that set them later work here too."""
    from flux.errors import InputError
    from flux.util import load_flow_model

    monkeypatch.setenv("FLUX_DEV", str(tmp_path / "gone.safetensors"))
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        load_flow_model("flux-dev", device="cpu")


def test_unknown_models_are_value_errors():
    """Programs written for upstream catch that."""
    from flux.util import load_flow_model

    with pytest.raises(ValueError, match="unknown model"):
        load_flow_model("flux-max", device="cpu")


# ---- python -m flux


def flux(*arguments: str, folder) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "flux", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def test_the_command_line(tmp_path):
    """Several prompts, a size that is rounded down, and numbers that go on from the images that are
    there.
    """
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "img_7.jpg").write_bytes(b"")
    size = ("--width", "130", "--height", "64", "--num_steps", "1", "--seed", "3")
    done = flux("--name", "flux-nano", *size, "--prompt", "a dog|a cat", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "130 is rounded down to 128" in done.stdout
    for index in (8, 9):
        with Image.open(tmp_path / "output" / f"img_{index}.jpg") as image:
            assert image.size == (128, 64)


def test_nothing_heavy_where_nothing_is_loaded():
    """transformers, the compiler, cv2 and matplotlib take seconds; importing every module must not pay."""
    modules = (
        "flux.cli, flux.util, flux.loaded_model, flux.editing.edit, flux.scan.sweep, flux.weights.load, "
        "flux.images.io, flux.attention.maps"
    )
    heavy = "{'transformers', 'diffusers', 'torch._dynamo', 'matplotlib', 'cv2', 'gradio'}"
    script = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_specs_can_be_changed_as_upstreams():
    """`dataclasses.replace` of a spec's parts, for fine-tunes of other sizes."""
    spec = configs["flux-dev"]
    smaller = replace(spec, params=replace(spec.params, depth=8, depth_single_blocks=2))
    assert smaller.num_layers == 10
