"""Kontext, Fill, Canny and Depth files: their shapes at full size, every form at a tiny size, mix-ups."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import lora_files, tiny_models, weight_files
from huggingface_hub import constants
from safetensors.torch import save_file

from flux.errors import InputError, InputWarning
from flux.model import Flux
from flux.modules.linear import PackedLinear
from flux.settings.demos import GenerateSettings, ModelSettings
from flux.specs import NANO_FOLDER, configs
from flux.util import load_flow_model
from flux.weights.find import find_model, find_redux
from flux.weights.load import on_meta

MANIFEST = Path(__file__).parents[1] / "manifests" / "flux1-dev.json"
CHANNELS = {"kontext": 64, "fill": 384, "canny": 128, "depth": 128}
WIDTHS = sorted(set(CHANNELS.values()))


@pytest.fixture
def small_tools(monkeypatch):
    """All large models with the tiny model's sizes, apart from their inputs."""
    for name, spec in configs.items():
        if spec.repo_id is not None:
            inputs = {"in_channels": spec.params.in_channels, "guidance_embed": spec.params.guidance_embed}
            base = replace(tiny_models.PARAMS, in_channels=64) if spec.base_params else None
            small = replace(tiny_models.PARAMS, **inputs)
            sizes = {"params": small, "base_params": base, "ae_params": tiny_models.AE_PARAMS}
            monkeypatch.setitem(configs, name, replace(spec, **sizes))


@pytest.fixture
def place(small_tools, tmp_path, monkeypatch):
    """Puts a file where upstream's package downloads it to; the text encoders and autoencoder are given."""
    monkeypatch.chdir(tmp_path)
    save_file(tiny_models.autoencoder().state_dict(), "ae.safetensors")
    monkeypatch.setenv("FLUX_AE", "ae.safetensors")
    monkeypatch.setenv("FLUX_TEXT_ENCODERS", str(NANO_FOLDER))

    def put(repository: str, filename: str, weights) -> Path:
        return weight_files.save(weights, Path("checkpoints") / f"black-forest-labs_{repository}" / filename)

    return put


def tiny(channels: int, **changes) -> Flux:
    return tiny_models.flux(in_channels=channels, **changes)


@pytest.mark.parametrize("name", [f"flux-dev-{tool}" for tool in (*CHANNELS, "canny-lora", "depth-lora")])
def test_names_and_shapes_at_full_size(name):
    """All are dev, but for the columns of one matrix."""
    expected = json.loads(MANIFEST.read_text())
    tool = name.removeprefix("flux-dev-").removesuffix("-lora")
    expected["img_in.weight"] = [3072, CHANNELS[tool]]
    model = on_meta(Flux, configs[name].params)
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == expected


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("form", ["file", "all-in-one", "fp8", "scaled fp8", "folder"])
def test_every_form_gives_the_saved_model(tmp_path, channels, form):
    source = tiny(channels)
    weights = meant = source.state_dict()
    path = tmp_path / "m.safetensors"
    if form == "folder":
        path = tmp_path / "folder"
        tiny_models.diffusers_transformer(source).save_pretrained(path / "transformer")
    elif form == "fp8":
        weights = {name: x.to(torch.float8_e4m3fn) for name, x in weights.items()}
        meant = {name: x.float() for name, x in weights.items()}
    elif form == "scaled fp8":
        weights, meant = weight_files.scaled_fp8(weights)
    if form != "folder":
        prefix = "model.diffusion_model." if form == "all-in-one" else ""
        weight_files.save(weight_files.with_prefix(weights, prefix), path)
    expected = weight_files.model_of(meant, source.params)
    assert weight_files.same(weight_files.load(path, source.params), expected)
    if form == "scaled fp8":
        kept = weight_files.load(path, source.params, keep_8bit=True)
        assert isinstance(kept.img_in, PackedLinear)
        assert weight_files.same(kept, expected)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_gguf(tmp_path, channels, kind):
    params = replace(weight_files.WIDE, in_channels=channels)
    source = tiny_models.randomized(Flux(params), 0)
    held = weight_files.save_gguf(source.state_dict(), tmp_path / "m.gguf", kind)
    packed = weight_files.load(tmp_path / "m.gguf", params)
    assert isinstance(packed.double_blocks[0].img_attn.qkv, PackedLinear)
    assert weight_files.same(packed, weight_files.model_of(held, params))


@pytest.mark.parametrize("channels", WIDTHS)
def test_diffusers_own_transformers(tmp_path, channels):
    """Made and saved by diffusers, as FluxFillPipeline and its like have them: both give the same numbers."""
    from diffusers import FluxTransformer2DModel

    theirs = FluxTransformer2DModel(
        in_channels=channels, out_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    tiny_models.randomized(theirs, 3)
    theirs.save_pretrained(tmp_path)
    params = replace(tiny_models.PARAMS, in_channels=channels, depth=2, depth_single_blocks=2)
    ours = weight_files.load(tmp_path, params)
    given = tiny_models.inputs(2, params=params)
    assert given["img"].shape[-1] == channels
    error = tiny_models.relative_error(ours(**given), tiny_models.ask_diffusers(theirs, given))
    assert error < 2e-6


# ---- files of the wrong model


def save_tiny(folder: Path, channels: int, **changes) -> Path:
    return weight_files.save(tiny(channels, **changes).state_dict(), folder / "m.safetensors")


@pytest.mark.parametrize(
    ("model", "channels", "expected"),
    [
        (
            "flux-dev",
            384,
            r"\(32, 384\) instead of \(32, 64\); it is a Fill model: load it as flux-dev-fill$",
        ),
        ("flux-dev", 128, r"it is a canny or depth model: load it as flux-dev-canny or flux-dev-depth$"),
        ("flux-schnell", 384, r"it is a Fill model: load it as flux-dev-fill$"),
        (
            "flux-dev-fill",
            64,
            r"it is a text-to-image or Kontext model: load it as flux-dev or flux-dev-krea",
        ),
        ("flux-dev-canny", 64, r"or flux-dev-kontext or flux-dev-canny-lora or flux-dev-depth-lora or"),
        ("flux-dev-canny", 384, r"it is a Fill model: load it as flux-dev-fill$"),
        ("flux-dev-kontext", 128, r"it is a canny or depth model"),
        ("flux-dev-canny-lora", 384, r"it is a Fill model"),
    ],
)
def test_a_file_of_another_tool(small_tools, tmp_path, monkeypatch, model, channels, expected):
    path = save_tiny(tmp_path, channels)
    lora = weight_files.save({"a.diff": torch.zeros(1)}, tmp_path / "lora.safetensors")
    monkeypatch.setenv("FLUX_LORA", str(lora))
    monkeypatch.setenv("FLUX_MODEL", str(path))
    with pytest.raises(InputError, match=expected) as caught:
        load_flow_model(model, "cpu", verbose=False)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_nothing_in_a_file_tells_kontext_from_dev(small_tools, tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX_MODEL", str(save_tiny(tmp_path, 64)))
    names = "flux-dev", "flux-dev-kontext"
    dev, kontext = (load_flow_model(name, "cpu", verbose=False, dtype=torch.float32) for name in names)
    assert weight_files.same(dev, kontext)


@pytest.mark.parametrize(
    ("model", "name", "other"),
    [
        ("flux-dev", "flux1-dev-kontext_fp8_scaled.safetensors", "flux-dev-kontext"),
        ("flux-dev-canny", "flux1-depth-dev.safetensors", "flux-dev-depth"),
        ("flux-dev-depth", "flux1-canny-dev.safetensors", "flux-dev-canny"),
    ],
)
def test_a_name_that_says_another_tool(place, tmp_path, model, name, other):
    """Only the name tells these apart."""
    path = weight_files.save(tiny(configs[model].params.in_channels).state_dict(), tmp_path / "m" / name)
    opened = find_model(ModelSettings(model=model, weights=str(path)), download=False)
    with pytest.warns(InputWarning, match=f"but its name says {other}: if so, give model {other}"):
        opened.check()


@pytest.mark.parametrize("part", ["weights", "ae_weights"])
def test_a_redux_file_in_another_place(small_tools, tmp_path, part):
    path = weight_files.save({"redux_up.weight": torch.zeros(4, 2)}, tmp_path / "redux.safetensors")
    with pytest.raises(InputError, match=r"which is a Redux adapter \(give it as redux_weights\); expected"):
        find_model(ModelSettings(model="flux-dev-redux", **{part: str(path)}))


def test_a_redux_adapter_that_is_none_is_told_before_the_models_are_loaded(small_tools, tmp_path):
    path = save_tiny(tmp_path, 64)
    fields = {"prompts": [""], "redux": ["a.png"], "redux_weights": str(path), "weights": str(path)}
    with pytest.raises(
        InputError, match=r"m\.safetensors, which is a FLUX.1 transformer .*; expected a Redux adapter"
    ):
        find_model(GenerateSettings(model="flux-dev", **fields))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "flux-dev-redux", "redux": ["a.png"], "siglip": "nowhere"}, "SigLIP"),
        ({"model": "flux-dev-depth", "control": "a.png", "depth_model": "nowhere"}, "depth model"),
    ],
)
def test_a_missing_image_encoder_is_told_before_the_models_are_loaded(place, fields, name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place("FLUX.1-dev", "flux1-dev.safetensors", tiny(64).state_dict())
    place("FLUX.1-Depth-dev", "flux1-depth-dev.safetensors", tiny(128).state_dict())
    place("FLUX.1-Redux-dev", "flux1-redux-dev.safetensors", {"redux_up.weight": torch.zeros(4, 2)})
    with pytest.raises(InputError, match=f"Got nowhere as the {name}, which is no folder here"):
        find_model(GenerateSettings(prompts=[""], **fields))
    published = {key: value for key, value in fields.items() if value != "nowhere"}
    with pytest.raises(InputError, match=r"Could not get preprocessor_config.json .* from the hub"):
        find_model(GenerateSettings(prompts=[""], **published))


def test_missing_opencv_is_told_before_the_models_are_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="OpenCV, which is not installed: pip install"):
        find_model(GenerateSettings(prompts=[""], model="flux-nano-canny", control="a.png"))


# ---- where files are found


@pytest.mark.parametrize(("tool", "repository"), [("fill", "FLUX.1-Fill-dev"), ("depth", "FLUX.1-Depth-dev")])
def test_upstreams_folder(place, tool, repository):
    source = tiny(CHANNELS[tool])
    path = place(repository, f"flux1-{tool}-dev.safetensors", source.state_dict())
    model = find_model(ModelSettings(model=f"flux-dev-{tool}"), download=False)
    assert model.files.flow == path
    assert weight_files.same(model.load_transformer("cpu", torch.float32), source)
    assert weight_files.same(load_flow_model(f"flux-dev-{tool}", "cpu", dtype=torch.float32), source)


def test_a_control_lora_by_each_way_to_name_it(place, tmp_path, monkeypatch):
    """Upstream's folder, the variables, the settings; and a file that has it merged in, which needs none."""
    base = tiny(64).state_dict()
    place("FLUX.1-dev", "flux1-dev.safetensors", base)
    change = lora_files.file_of(
        lora_files.pairs(base, ["final_layer.linear"]), str, downs="lora_A", ups="lora_B"
    )
    places = [place("FLUX.1-Canny-dev-lora", "flux1-canny-dev-lora.safetensors", change)]
    settings = ModelSettings(model="flux-dev-canny-lora")

    def found(**more):
        return find_model(settings.model_copy(update=more), download=False).files.own_lora

    assert found() == (places[0], 0.85, None)
    for variable in ("FLUX_LORA", "FLUX_DEV_CANNY_LORA"):
        places.append(weight_files.save(change, tmp_path / f"{variable}.safetensors"))
        monkeypatch.setenv(variable, str(places[-1]))
        assert found().path == places[-1]
    own = weight_files.save(change, tmp_path / "own.safetensors")
    assert found(lora_weights=str(own), lora_scale=0.5) == (own, 0.5, None)
    merged = save_tiny(tmp_path, 128)
    assert found(weights=str(merged)) is None
    with pytest.warns(
        InputWarning, match="is flux-dev-canny-lora already: lora_weights and lora_scale change"
    ):
        assert found(weights=str(merged), lora_scale=0.5) is None
    with pytest.raises(InputError, match=r"FLUX.1 transformer .*; expected a LoRA"):
        found(lora_weights=str(merged))


@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_strength_of_a_models_own_lora(place, scale):
    base = tiny(64).state_dict()
    place("FLUX.1-dev", "flux1-dev.safetensors", base)
    chosen = lora_files.pairs(base, ["final_layer.linear"])
    change = lora_files.file_of(chosen, str, downs="lora_A", ups="lora_B")
    place("FLUX.1-Depth-dev-lora", "flux1-depth-dev-lora.safetensors", change)
    opened = find_model(ModelSettings(model="flux-dev-depth-lora", lora_scale=scale), download=False)
    model = opened.load_transformer("cpu", torch.float32)
    expected = lora_files.added(base, chosen, 0.85 if scale is None else scale)["final_layer.linear.weight"]
    torch.testing.assert_close(model.final_layer.linear.weight, expected)


def test_other_loras_of_a_models_own_are_merged():
    """A wrapper adds its products in another order: numbers would differ from those of the demos."""
    assert type(load_flow_model("flux-nano-schnell", "cpu")) is Flux


def test_redux_by_each_way_to_name_it(place, monkeypatch):
    """Any large text-to-image model may use it."""
    expected = place("FLUX.1-Redux-dev", "flux1-redux-dev.safetensors", {"redux_up.weight": torch.zeros(1)})
    for name in ("flux-dev-redux", "flux-dev", "flux-schnell"):
        assert find_redux(configs[name], download=False) == expected
    monkeypatch.setenv("FLUX_REDUX", "ae.safetensors")
    assert find_redux(configs["flux-dev"]) == Path("ae.safetensors")
    assert find_redux(configs["flux-dev"], "mine") == Path("mine")
    with pytest.raises(InputError, match="this model has no Redux adapter"):
        find_redux(configs["flux-nano"])
