"""A visitor's LoRA: looked into, put beside the model for one run, and taken off again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import lora_files
from helpers.studio import assert_same_image, make_studio, run_demo
from safetensors.torch import save_file

from flux.errors import InputError
from flux.images.io import read_image
from flux.settings.demos import Lora
from flux.studio.forms import generate_settings, lora_settings
from flux.studio.work.generate import run_generate
from flux.studio.work.lora import keep_lora, lora_on, run_lora

MODULES = ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.2.linear1")
LAYERS = (0, 1, 7)  # of these modules: flux-nano has five double-stream layers


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def lora(nano, uploads):
    """A LoRA in three layers of flux-nano."""
    chosen = lora_files.pairs(nano.model.state_dict(), MODULES)
    path = uploads / "my lora (1).safetensors"
    save_file(lora_files.file_of(chosen, lambda name: f"diffusion_model.{name}", 4.0), path)
    return path


@pytest.fixture(scope="module")
def lokr(nano, uploads):
    """A change that cannot stand beside a layer, and one of a norm."""
    rows, columns = nano.model.get_submodule(MODULES[0]).weight.shape
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 4, generator=generator)
    second = torch.randn(rows // 4, columns // 4, generator=generator) * 4 / columns**0.5
    scale = nano.model.double_blocks[0].img_attn.norm.query_norm.scale
    file = {
        f"diffusion_model.{MODULES[0]}.lokr_w1": first,
        f"diffusion_model.{MODULES[0]}.lokr_w2": second,
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": 1.5 * scale.clone(),
    }
    save_file(file, uploads / "lokr.safetensors")
    return uploads / "lokr.safetensors"


def session_of(studio):
    return studio.sessions.of("a")


def keep(studio, path):
    return keep_lora(studio, session_of(studio), {"path": str(path)}, path.parent)


def form_of(path, **more):
    sliders = {"on": [*range(15)], "factors": {}}
    return {"lora": str(path), "prompt": "a dog", "seed": 3, "weight": 1.0, "layers": sliders} | more


def compare(studio, path, **more):
    """The runs without the LoRA and with it."""
    settings = lora_settings(studio, form_of(path, **more))
    *_, (_, before, after) = run_lora(studio, session_of(studio), settings)
    return before, after


def draw(studio):
    settings = generate_settings(studio, {"prompt": "a dog", "seed": 3})
    *_, (_, run) = run_generate(studio, studio.sessions.of("other"), settings)
    return run.images["000"]


def pixels(run):
    return np.asarray(read_image(run.images["000"])).astype(int)


@pytest.fixture
def untouched(studio, nano):
    """After the test, the model is what it was, and draws the same for everybody."""
    drawn = draw(studio)
    modules = dict(nano.model.named_modules())
    kinds = {name: type(module) for name, module in modules.items()}
    weights = {name: value.clone() for name, value in nano.model.state_dict().items()}
    yield
    assert {name: type(module) for name, module in nano.model.named_modules()} == kinds
    after = nano.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert_same_image(drawn, draw(studio))


def test_what_it_changes(studio, lora):
    held = keep(studio, lora)
    kept, report = held.path, held.report
    assert kept.name == "my_lora_1.safetensors"
    assert kept.is_relative_to(session_of(studio).folder)
    assert report.lora.layers == list(LAYERS)
    assert all(change.norm for change in report.changes)


@pytest.mark.parametrize("form", ["lora", "lokr"])
def test_with_and_without_it(studio, untouched, tmp_path, request, form):
    """The image with it is that of a model that was loaded with it, up to rounding."""
    kept = keep(studio, request.getfixturevalue(form)).path
    before, after = compare(studio, kept)
    assert_same_image(before.images["000"], draw(studio))
    assert np.abs(pixels(before) - pixels(after)).max() > 20
    settings = json.loads(after.record.read_text())["settings"]
    assert settings["lora"] == [{"file": kept.name, "weight": 1.0}]
    (after.folder / kept.name).hardlink_to(kept)
    run_demo("demo_0_test", after.record, tmp_path / "again")
    again = np.asarray(read_image(tmp_path / "again" / "000.png")).astype(int)
    assert np.abs(again - pixels(after)).max() <= 1


def test_layers_off_and_weaker(studio, lora, untouched):
    kept = keep(studio, lora).path
    factors = dict.fromkeys(map(str, LAYERS), 1.0)
    before, off = compare(studio, kept, layers={"on": [0], "factors": {**factors, "0": 0.0}})
    assert_same_image(before.images["000"], off.images["000"])
    factors = {"0": 0.5, "1": 1.0, "7": 1.5}
    _, some = compare(studio, kept, layers={"on": [0, 1], "factors": factors})
    layers = json.loads(some.record.read_text())["settings"]["lora"][0]["layers"]
    assert layers == {"0": 0.5, "7": 0.0}
    assert np.abs(pixels(before) - pixels(some)).max() > 5


def test_the_image_without_it_is_drawn_once(studio, lora):
    kept = keep(studio, lora).path
    first, _ = compare(studio, kept)
    second, _ = compare(studio, kept, weight=0.5)
    assert second is first
    other, _ = compare(studio, kept, seed=4)
    assert other is not first


def test_a_cancelled_run_takes_it_off(studio, lokr, untouched):
    kept = keep(studio, lokr).path
    settings = lora_settings(studio, form_of(kept, num_steps=8))
    session = session_of(studio)
    for update, before, _ in run_lora(studio, session, settings):
        if before is not None and update.done == 2:
            session.stop.set()
    assert len(session.runs) == 1, "the run with it left nothing"
    session.stop.clear()


def test_a_program_that_leaves_takes_it_off(studio, lora, untouched):
    kept = keep(studio, lora).path
    running = run_lora(studio, session_of(studio), lora_settings(studio, form_of(kept, num_steps=8)))
    for update, before, _ in running:
        if before is not None and update.done == 2:
            running.close()
            break
    session_of(studio).stop.clear()


def test_damage_that_shows_while_it_is_put_on(studio, nano, untouched, uploads):
    """A part that is changed already is as it was again."""
    rows, columns = nano.model.get_submodule(MODULES[0]).weight.shape
    width, names = rows // 3, ("to_q", "to_v")
    changes = torch.ones(2, width, columns)
    changes[1, 0, 0] = torch.nan
    file = {
        f"transformer.transformer_blocks.0.attn.{n}.diff": changes[i].clone() for i, n in enumerate(names)
    }
    path = uploads / "damaged.safetensors"
    save_file(file, path)
    with pytest.raises(InputError, match="NaN"):
        compare(studio, path)


def test_weights_that_other_models_use_are_not_written_into(studio, nano, lokr):
    attention = nano.model.double_blocks[0].img_attn
    weights = (attention.qkv.weight, attention.norm.query_norm.scale)
    before = [weight.clone() for weight in weights]
    with lora_on(studio.engine, Lora(file=str(lokr), weight=1.0)):
        assert all(map(torch.equal, weights, before))
        assert not torch.equal(attention.norm.query_norm.scale, weights[1])
    assert attention.qkv.weight is weights[0]


# ---- what is refused


def test_files_that_are_no_loras(studio, uploads, tmp_path, lora):
    (uploads / "text.safetensors").write_text("not a LoRA")
    (uploads / "short.safetensors").write_bytes(b"ab")
    (uploads / "pickle.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    for name in ("text", "short", "pickle"):
        with pytest.raises(InputError, match=rf"Got {name}\.safetensors") as caught:
            keep(studio, uploads / f"{name}.safetensors")
        assert str(uploads) not in str(caught.value)
    with pytest.raises(InputError, match="not uploaded"):
        keep_lora(studio, session_of(studio), {"path": str(lora)}, tmp_path / "elsewhere")
    assert not list(session_of(studio).folder.rglob("*.safetensors"))


def test_loras_for_other_models(studio, uploads):
    down, up = torch.zeros(4, 3072), torch.zeros(9216, 4)
    file = lora_files.file_of({MODULES[0]: (down, up)}, lambda name: f"diffusion_model.{name}")
    save_file(file, uploads / "dev.safetensors")
    with pytest.raises(InputError, match=r"Got dev\.safetensors, a LoRA for flux-dev: .* flux-nano"):
        keep(studio, uploads / "dev.safetensors")


def test_large_loras(studio, lora, lokr, monkeypatch):
    small = replace(studio, limits=replace(studio.limits, lora_bytes=10))
    with pytest.raises(InputError, match="expected at most 0"):
        keep(small, lora)
    monkeypatch.setattr("flux.studio.work.lora.COPIED_BYTES", 1000)
    with pytest.raises(InputError, match=r"LoKr.*GB of copies"):
        keep(studio, lokr)
    keep(studio, lora)


@pytest.mark.parametrize("hindrance", ["offloaded", "quantised", "compiled"])
def test_models_that_no_lora_can_stand_beside(nano, tmp_path, lora, hindrance):
    studio = make_studio(nano, tmp_path)
    changes = {"quantised": {"quantize": "8bit"}, "compiled": {"compile": True}}
    studio.engine.settings = studio.engine.settings.model_copy(update=changes.get(hindrance, {}))
    if hindrance == "offloaded":
        studio.engine.pipe = replace(nano, offloaded={nano.model: None})
    with pytest.raises(InputError, match=f"model is {hindrance}"):
        keep(studio, lora)


def test_the_last_lora_is_kept(studio, lora, lokr):
    first = keep(studio, lora).path
    second = keep(studio, lokr).path
    assert not first.exists()
    assert second.is_file()
    assert lora.is_file()
    with pytest.raises(InputError, match="upload it again"):
        compare(studio, first)


def test_values_that_no_slider_sends(studio, lora):
    for more in (
        {"lora": None},
        {"weight": 3},
        {"weight": "a"},
        {"layers": {"on": [99], "factors": {}}},
        {"layers": {"on": [], "factors": {}}},
        {"layers": {"on": [0], "factors": {"0": -1}}},
        {"layers": {"on": [0], "factors": {"x": 1}}},
        {"layers": {"on": [0], "factors": [1]}},
    ):
        with pytest.raises(InputError):
            lora_settings(studio, form_of(lora, **more))
