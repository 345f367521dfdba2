"""Devices and dtypes by name."""

import os
import platform
import sys
from contextlib import suppress

import pytest
import torch

from flux.errors import InputError
from flux.runtime.devices import (
    check_compiler,
    pick_device,
    pick_dtype,
    return_freed_memory,
    total_memory,
)
from flux.specs import configs


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps:7", "meta"])
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


def test_each_device_and_model_has_its_dtype():
    cpu, nano, dev = torch.device("cpu"), configs["flux-nano"], configs["flux-dev"]
    assert pick_dtype("auto", cpu, nano) == torch.float32
    assert pick_dtype("auto", cpu, dev) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cuda"), nano) == torch.bfloat16
    assert pick_dtype("float16", cpu, dev) == torch.float16


def test_a_compiler_is_looked_for(tmp_path, monkeypatch):
    """On a GPU it is C's, for Triton, on the CPU C++'s. A variable that names one decides."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"compile true.* g\+\+ is not here: .* CXX"):
        check_compiler(torch.device("cpu"))
    with pytest.raises(InputError, match=r"gcc or clang or cc is not here: .* CC,"):
        check_compiler(torch.device("cuda"))
    check_compiler(torch.device("mps"))
    for name in ("mine", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh")
        (tmp_path / name).chmod(0o755)
    check_compiler(torch.device("cuda"))
    monkeypatch.setenv("CXX", "mine -O2")
    check_compiler(torch.device("cpu"))
    monkeypatch.setenv("CC", "lost")
    with pytest.raises(InputError, match="lost is not here"):
        check_compiler(torch.device("cuda"))


def test_memory_of_this_machine():
    memory = total_memory(torch.device("cpu"))
    assert memory is None or memory > 2**28
    assert total_memory(torch.device("meta")) is None


def resident_megabytes():
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="other systems keep nothing back")
def test_freed_memory_goes_back_to_the_system():
    blocks = [bytearray(4000) for _ in range(25_000)]
    kept = blocks[::100]  # memory between them cannot shrink away from the end
    del blocks
    before = resident_megabytes()
    return_freed_memory()
    assert resident_megabytes() < before - 75, "94 measured"
    assert len(kept) == 250
