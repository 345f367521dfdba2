"""The table of models."""

import pytest

from flux.errors import InputError
from flux.specs import configs, get_spec


@pytest.mark.parametrize("name", list(configs))
def test_sizes_belong_together(name):
    spec = configs[name]
    assert sum(spec.params.axes_dim) * spec.params.num_heads == spec.params.hidden_size
    latent = 4 * spec.ae_params.z_channels
    assert spec.params.out_channels == latent
    # Beside the noise: a control map's latent; a masked image's latent and 8x8 pixels of its mask for each.
    beside = {"control": latent, "fill": latent + 4 * 64}.get(spec.condition, 0)
    assert spec.params.in_channels == latent + beside
    assert (spec.control is not None) == (spec.condition == "control")
    assert (spec.base_params is not None) == (spec.lora_filename is not None)
    assert spec.size % 16 == 0
    assert all(0 <= layer < spec.num_layers for layer in spec.vital_layers or ())


def test_the_numbers_of_the_published_models():
    dev, schnell, krea = (configs[f"flux-{name}"] for name in ("dev", "schnell", "dev-krea"))
    assert (dev.text_length, schnell.text_length) == (512, 256)
    assert (dev.shifted, schnell.shifted) == (True, False)
    assert (dev.params.guidance_embed, schnell.params.guidance_embed) == (True, False)
    assert krea.params == dev.params
    assert dev.num_layers == schnell.num_layers == 57
    assert dev.vital_layers == (1, 0, 2, 18, 53, 28, 54, 17, 56, 25), "the most vital first"


def test_the_package_stays_small():
    files = [path for path in configs["flux-nano"].folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 52 * 2**20


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("flux-dve", "flux-dev"),
        ("schnell", "flux-schnell"),
        ("Flux-Nano", "flux-nano"),
        ("flux-kontext-dev", "flux-dev-kontext"),
        ("flux-1-fill-dev", "flux-dev-fill"),
        ("flux-dev-canny_lora", "flux-dev-canny-lora"),
        ("flux-krea-dev", "flux-dev-krea"),
    ],
)
def test_an_unknown_model_is_told_with_a_near_one(name, near):
    with pytest.raises(InputError) as error:
        get_spec(name)
    assert f"'{name}'" in str(error.value)
    assert f"did you mean '{near}'" in str(error.value)


def test_the_numbers_of_the_tools():
    """Upstream's table, and the defaults of its commands."""
    tools = {name: configs[f"flux-dev-{name}"] for name in ["kontext", "fill", "canny", "depth", "redux"]}
    guidance = {"kontext": 2.5, "fill": 30, "canny": 30, "depth": 10, "redux": 2.5}
    assert {name: spec.guidance for name, spec in tools.items()} == guidance
    assert {name: spec.num_steps for name, spec in tools.items() if spec.num_steps != 50} == {"kontext": 30}
    assert {name: spec.text_length for name, spec in tools.items() if spec.text_length != 512} == {
        "fill": 128
    }
    for name in ("fill", "canny", "depth", "kontext"):
        assert tools[name].repo_id == f"black-forest-labs/FLUX.1-{name.capitalize()}-dev"
        assert tools[name].repo_flow == f"flux1-{name}-dev.safetensors"
        assert tools[name].env_flow == (f"FLUX_DEV_{name.upper()}", "FLUX_MODEL")


@pytest.mark.parametrize("name", ["kontext", "fill", "canny"])
def test_the_small_tools(name):
    """flux-nano's files and a LoRA beside them. Its kind and its channels are those of the large model."""
    spec, nano, large = (configs[each] for each in (f"flux-nano-{name}", "flux-nano", f"flux-dev-{name}"))
    assert (spec.folder, spec.repo_flow, spec.base_params) == (nano.folder, nano.repo_flow, nano.params)
    assert (spec.folder / spec.lora_filename).stat().st_size < 3_000_000
    for field in ("condition", "control", "lora_repo_id"):
        assert getattr(spec, field) == getattr(large, field)
    assert spec.params.in_channels == large.params.in_channels
    for field in ("text_length", "num_steps", "size", "licence", "watermark", "dinov2"):
        assert getattr(spec, field) == getattr(nano, field)


@pytest.mark.parametrize("name", ["canny", "depth"])
def test_control_loras(name):
    """Dev's files and a LoRA of another repository; all else as the model that it makes."""
    spec, whole, dev = (configs[f"flux-dev{end}"] for end in (f"-{name}-lora", f"-{name}", ""))
    assert (spec.repo_id, spec.repo_flow, spec.base_params) == (dev.repo_id, dev.repo_flow, dev.params)
    assert spec.lora_repo_id == f"black-forest-labs/FLUX.1-{name.capitalize()}-dev-lora"
    assert spec.lora_filename == f"flux1-{name}-dev-lora.safetensors"
    assert (spec.lora_scale, spec.env_lora) == (0.85, (f"FLUX_DEV_{name.upper()}_LORA", "FLUX_LORA"))
    for field in ("params", "condition", "control", "guidance", "num_steps"):
        assert getattr(spec, field) == getattr(whole, field)


def test_an_unknown_model_with_no_near_one():
    with pytest.raises(InputError) as error:
        get_spec("stable-diffusion")
    assert str(error.value).startswith("Got unknown model 'stable-diffusion'. Known are flux-dev, ")
