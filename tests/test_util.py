"""Upstream's helpers in `flux.util`: places of files, tokens, state dicts, watermarks of one's own."""

import getpass
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import tiny_models

from flux import bfl, util
from flux.errors import InputError
from flux.images.watermark import extract_watermark
from flux.model import Flux
from flux.specs import configs
from flux.weights.repository import Repository

REDUX = ("black-forest-labs/FLUX.1-Redux-dev", "flux1-redux-dev.safetensors", "FLUX_REDUX")


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    """The variable, then upstream's folder, then the hub; nothing is made meanwhile."""
    monkeypatch.chdir(tmp_path)
    fetched = []

    def fetch(self, wanted, download):
        fetched.append((self.licence, self.id, *wanted))
        return Path("/cache")

    monkeypatch.setattr(Repository, "fetch", fetch)
    assert util.get_checkpoint_path(*REDUX) == Path("/cache") / REDUX[1]
    assert util.get_checkpoint_path("me/mine", "x.safetensors", "MINE") == Path("/cache/x.safetensors")
    assert fetched == [
        (configs["flux-dev"].licence, *REDUX[:2]),
        ("its licence is on its page", "me/mine", "x.safetensors"),
    ]
    assert list(tmp_path.iterdir()) == []
    path = Path("checkpoints/black-forest-labs_FLUX.1-Redux-dev") / REDUX[1]
    path.parent.mkdir(parents=True)
    path.touch()
    assert util.get_checkpoint_path(*REDUX) == path
    assert path.parents[1] == util.CHECKPOINTS_DIR
    monkeypatch.setenv("FLUX_REDUX", str(tmp_path / "mine"))
    with pytest.raises(InputError, match=r"mine in FLUX_REDUX, which does not exist"):
        util.get_checkpoint_path(*REDUX)
    (tmp_path / "mine").touch()
    assert util.get_checkpoint_path(*REDUX) == tmp_path / "mine"
    assert len(fetched) == 2


def test_tokens(monkeypatch):
    logins = []

    def login(token):
        if token == "wrong":
            raise ValueError("Invalid token\nmore")
        logins.append(token)

    monkeypatch.setattr(huggingface_hub, "login", login)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: logins[-1] if logins else None)
    assert not util.ensure_hf_auth()
    for typed, message in (("  ", "no token"), ("wrong", r"does not accept \(Invalid token\)")):
        monkeypatch.setattr(getpass, "getpass", lambda prompt, typed=typed: typed)
        with pytest.raises(InputError, match=message):
            util.prompt_for_hf_auth()
    monkeypatch.setattr(getpass, "getpass", lambda prompt: " hf_token ")
    assert util.prompt_for_hf_auth()
    assert logins == ["hf_token"]
    assert util.ensure_hf_auth()


def test_a_state_dict_is_padded_where_the_model_is_larger(capsys):
    """As upstream's programs load a control LoRA's base."""
    base = tiny_models.flux().state_dict()
    wide = Flux(replace(tiny_models.PARAMS, in_channels=128))
    expanded = util.optionally_expand_state_dict(wide, base | {"further": torch.zeros(1)})
    left = wide.load_state_dict(expanded, strict=False)
    assert left.unexpected_keys == ["further"]
    assert torch.equal(wide.img_in.weight[:, :64], base["img_in.weight"])
    assert wide.img_in.weight[:, 64:].abs().max() == 0
    assert base["img_in.weight"].shape[1] == 64, "the given one is as it was"
    assert expanded["txt_in.weight"] is base["txt_in.weight"]
    util.print_load_warning([], left.unexpected_keys)
    util.print_load_warning(["a", "b"], [])
    assert (
        capsys.readouterr().out == "Got 1 unexpected tensors:\n\tfurther\nGot 2 missing tensors:\n\ta\n\tb\n"
    )


def test_a_watermark_of_ones_own():
    bits = [int(bit) for bit in f"{0xC0FFEE123456:048b}"]
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    assert extract_watermark(util.WatermarkEmbedder(bits)(image)) == bits
    own = util.WatermarkEmbedder(util.WATERMARK_BITS)(image)
    assert torch.equal(own, util.embed_watermark(image))
    assert extract_watermark(own) == util.WATERMARK_BITS


def test_usage_is_reported_under_upstreams_names():
    named = {name: bfl.USAGE_NAMES.get(name) for name in configs if name.startswith("flux-dev")}
    assert named.pop("flux-dev-de-distilled") is None
    assert named.pop("flux-dev-kontext") == "flux-1-kontext-dev"
    assert {named.pop("flux-dev"), named.pop("flux-dev-krea")} == {"flux-1-dev", "flux-1-krea-dev"}
    assert set(named.values()) == {"flux-tools"}
    assert len(named) == 6


@pytest.mark.parametrize("load", [util.load_flow_model, util.load_ae, util.load_t5, util.load_clip])
def test_a_device_that_is_not_here(load):
    """Upstream's default is a CUDA GPU."""
    with pytest.raises(InputError, match="Got device 'cuda:99', which is not here"):
        load(name="flux-nano", device="cuda:99")


def test_a_folder_of_text_encoders_as_text():
    folder = str(configs["flux-nano"].folder)
    assert util.load_clip("cpu", name="flux-nano", folder=folder)(["a dog"]).shape == (1, 128)
