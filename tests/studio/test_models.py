"""The models that a studio serves beside its first one."""

import pytest

from flux.errors import InputError
from flux.settings.demos import ModelSettings
from flux.specs import configs
from flux.studio.address import Address
from flux.studio.models import about_model, models_beside

NANO = ModelSettings(device="cpu", num_steps=7)


def names(settings, given=None, is_public=False):
    return [other.model for other in models_beside(settings, given, is_public)]


def test_models_of_the_same_files_are_served_on_ones_own_machine():
    found = models_beside(NANO, None, is_public=False)
    assert {other.model for other in found} == {name for name in configs if "nano" in name} - {"flux-nano"}
    assert {other.device for other in found} == {"cpu"}
    assert {other.num_steps for other in found} == {None}  # steps are each model's own


def test_a_public_studio_serves_what_its_operator_names():
    assert names(NANO, is_public=True) == []
    assert names(NANO, ["flux-nano-schnell", "flux-nano"], is_public=True) == ["flux-nano-schnell"]
    assert names(NANO, []) == []


def test_models_that_cannot_be_served(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FLUX_MODEL", str(tmp_path / "gone.safetensors"))
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        names(NANO, ["flux-dev"])
    with pytest.raises(InputError, match="did you mean 'flux-nano-schnell'"):
        names(NANO, ["flux-nano-schnel"])


def test_own_weights_are_shared_within_a_family(tmp_path):
    own = tmp_path / "mine.safetensors"
    own.symlink_to(configs["flux-nano"].folder / "transformer.safetensors")
    [other] = models_beside(NANO.model_copy(update={"weights": str(own)}), ["flux-nano-schnell"], False)
    assert other.weights == str(own)


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ({}, False),
        ({"host": "127.0.0.1"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"share": True}, True),
        ({"root_path": "/studio"}, True),
        ({"allowed_hosts": ("studio.example.org",)}, True),
    ],
)
def test_who_may_open_the_page(monkeypatch, address, is_public):
    monkeypatch.delenv("SPACE_HOST", raising=False)
    assert Address(**address).is_public == is_public


def test_each_kind_of_model_is_described():
    assert len({about_model(spec) for spec in configs.values()}) >= 6
