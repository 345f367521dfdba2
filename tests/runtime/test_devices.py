"""Devices and dtypes by name."""

import os
import sys
from contextlib import suppress

import pytest
import torch

from flux.errors import InputError
from flux.runtime.devices import pick_device, pick_dtype
from flux.specs import configs


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps:7"])
def test_missing_devices_are_refused(name):
    with pytest.raises(InputError, match="device"):
        pick_device(name)


def test_a_device_by_its_name():
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="torch has expandable segments only on Linux")
def test_gpu_memory_has_expandable_segments_unless_the_user_chooses(monkeypatch):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

    def settings(device: str, **own: str) -> list[str | None]:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with suppress(InputError):
            pick_device(device)
        return [os.environ.get(name) for name in names]

    assert settings("cuda:99") == ["expandable_segments:True", None]
    assert settings("cpu") == [None, None]
    for name in names:
        own = settings("cuda:99", **{name: "max_split_size_mb:64"})
        assert own == ["max_split_size_mb:64" if each == name else None for each in names]


def test_dtypes():
    cpu, nano, dev = torch.device("cpu"), configs["flux-nano"], configs["flux-dev"]
    assert pick_dtype("auto", cpu, nano) == torch.float32
    assert pick_dtype("auto", cpu, dev) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda"), nano) == torch.bfloat16
    assert pick_dtype("float16", cpu, dev) == torch.float16
