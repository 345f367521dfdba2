"""What all benchmarks share: which machine it was, how long a step took, how much memory."""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from importlib import metadata
from itertools import pairwise

import torch
from torch import nn

from flux.runs.record import versions

GIB = 2**30
OTHERS = ("diffusers", "triton", "quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl")


def machine(device: torch.device) -> dict:
    """Date, device and versions: what numbers mean nothing without."""
    on_gpu = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU with {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {**versions(), **_others(), "cuda": torch.version.cuda},
    }


def _others() -> dict[str, str]:
    """Versions of what a measurement depends on and an installation may lack."""
    found = {}
    for name in OTHERS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """How long the step takes, on a GPU by its own clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, its columns aligned for a terminal too."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


class PassClock:
    """Marks the moment at which each pass through a transformer ends, for as long as the `with` block lasts.

    On a GPU by events, so that nothing waits for the clock.

    Args:
        last: the transformer's last module.
    """

    def __init__(self, last: nn.Module, device: torch.device):
        self.last, self.on_gpu, self.marks = last, device.type == "cuda", []
        self.peak_gib = None

    def __enter__(self) -> "PassClock":
        self.hook = self.last.register_forward_hook(self._mark)
        return self

    def __exit__(self, *error) -> None:
        self.hook.remove()

    def _mark(self, *_) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
            self.peak_gib = torch.cuda.max_memory_allocated() / GIB
        else:
            self.marks.append(time.perf_counter())

    def step_ms(self, passes: int) -> dict[str, float]:
        """Milliseconds from the end of one step to that of the next, where a step is so many passes."""
        if self.on_gpu:
            torch.cuda.synchronize()
        ends = self.marks[passes - 1 :: passes]
        between = [a.elapsed_time(b) if self.on_gpu else 1000 * (b - a) for a, b in pairwise(ends)]
        return {"median": statistics.median(between), "min": min(between), "max": max(between)}
