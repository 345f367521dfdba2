"""Devices and dtypes by name; memory of this process."""

import ctypes
import os
import shutil
import sys

import torch

from flux.errors import InputError
from flux.specs import ModelSpec


def pick_device(name: str) -> torch.device:
    """Return the device of that name. "auto" prefers a CUDA GPU, then an Apple GPU, then the CPU.

    Raises:
        InputError: If the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    # Tensors have many sizes. Segments that can grow leave fewer gaps, so that a tight plan fits.
    # torch reads this variable when it first uses a GPU. A value that the user has set is kept.
    if name.startswith("cuda") and sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # fails on "meta" too
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Got device {name!r}, which is not here: give cpu, cuda, cuda:1, mps or auto"
        ) from error
    return device


def check_compiler(device: torch.device) -> None:
    """Check that torch.compile finds the C or C++ compiler that it needs for this device.

    Raises:
        InputError: There is none.
    """
    if device.type == "cpu":
        usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
        variable, names = "CXX", [os.environ.get("CXX") or usual]
    elif device.type == "cuda" and sys.platform == "linux":  # Triton builds its launchers with it
        variable, names = "CC", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        return
    if not any(shutil.which(name.split()[0]) for name in names):
        raise InputError(
            f"Got compile true, which needs a compiler, and {' or '.join(names)} is not here: install one, "
            f"name it in the environment variable {variable}, or leave compile out"
        )


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of memory of a GPU or, for the CPU, of this machine. If None, they are not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main_memory() -> int | None:
    """Return the bytes of main memory and swap space of this machine. If None, they are not known."""
    if sys.platform != "linux":  # elsewhere swap space grows when it is needed
        return None
    with open("/proc/meminfo", encoding="utf-8") as file:
        kibibytes = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in file)}
    return 1024 * (kibibytes["MemTotal"] + kibibytes["SwapTotal"])


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    glibc keeps it where something behind it is still in use, so a process that serves many seems to grow.
    Other systems need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def pick_dtype(name: str, device: torch.device, spec: ModelSpec) -> torch.dtype:
    """Return the dtype of that name. "auto" is float32 for the bundled model on a CPU, otherwise bfloat16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" and spec.folder else torch.bfloat16
    return getattr(torch, name)
