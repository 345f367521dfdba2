"""Measures FLUX.1-dev's linear layers with weights packed as GGUF, beside diffusers' on the same bytes.

    python -m benchmarks.gguf_linears [--kinds Q8_0,Q4_K] [--tokens 4608] [--output FILE.json] [--toy]

For each kind, it measures the milliseconds that all matrices of the 57 blocks take in a step of 1024x1024
with 512 text tokens: eager, compiled, and in plain bf16. The bytes are random. `--toy` runs it tiny, on a CPU
too.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine, markdown
from flux.errors import InputError, exit_on_input_error
from flux.files import write_json
from flux.modules.gguf_blocks import BLOCKS
from flux.modules.linear import PackedLinear
from flux.runtime.devices import pick_device
from flux.settings.command_line import run
from flux.settings.fields import Words

# Rows and columns in units of the width, how many matrices there are, and the share of all tokens that they
# see: on average half for each stream of a double block. Modulations see the conditioning vector alone.
SHAPES = (
    (6, 1, 38, 0), (3, 1, 38, 0.5), (1, 1, 38, 0.5), (4, 1, 38, 0.5), (1, 4, 38, 0.5), (3, 1, 38, 0),
    (7, 1, 38, 1), (1, 5, 38, 1),
)  # fmt: skip
LAYERS: tuple[str, ...] = ("plain", "ours", "ours compiled", "diffusers")


def median_milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Measure the median of the times, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def diffusers_linear(
    packed: Tensor, kind: str, columns: int, dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Build diffusers' layer with the same bytes."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    layer = GGUFLinear(columns, len(packed), bias=False, compute_dtype=dtype, device="meta")
    parameter: Any = GGUFParameter  # its hints are those of nn.Parameter
    layer.weight = parameter(packed, quant_type=gguf.GGMLQuantizationType[kind])
    return layer


def measure_kind(kind: str, tokens: int, width: int, device: torch.device) -> dict[str, float]:
    """Measure the milliseconds that all matrices of a step take, by plain layers, ours and diffusers'."""
    numbers, size = BLOCKS[kind]
    total = dict.fromkeys(LAYERS, 0.0)
    for rows, columns, count, share in SHAPES:
        rows, columns = rows * width, columns * width
        packed = torch.randint(256, (rows, columns // numbers * size), dtype=torch.uint8, device=device)
        x = torch.randn(max(1, round(share * tokens)), columns, dtype=torch.bfloat16, device=device)
        torch._dynamo.reset()  # each shape is compiled separately, as each block is
        ours = PackedLinear(packed, kind, None, None, torch.bfloat16)
        layers = {
            "plain": nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=device),
            "ours": ours,
            "ours compiled": torch.compile(ours, fullgraph=True),
            "diffusers": diffusers_linear(packed, kind, columns),
        }
        for name, layer in layers.items():
            total[name] += count * median_milliseconds(partial(layer, x), device)
    return total


@exit_on_input_error()
@torch.inference_mode()
def main(
    kinds: Words = ("Q8_0", "Q4_K"),
    tokens: int = 4608,
    device: str = "auto",
    output: str | None = None,
    toy: bool = False,
) -> None:
    """Run the benchmark.

    Args:
        kinds: kinds of GGUF blocks
        tokens: number of tokens
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        output: JSON file to write to; if not set, none is written
        toy: measure tiny layers, on any machine
    """
    where, width = pick_device(device), 256 if toy else 3072
    tokens = 64 if toy else tokens
    unknown = [kind for kind in kinds if kind not in BLOCKS]
    if unknown:
        raise InputError(f"Got kinds {', '.join(unknown)}, expected some of {', '.join(BLOCKS)}")
    results = {kind: measure_kind(kind, tokens, width, where) for kind in kinds}
    rows = [[kind, *(f"{times[name]:.1f}" for name in LAYERS)] for kind, times in results.items()]
    print(markdown(["ms a step", *LAYERS], rows))
    if output:
        write_json(output, {"machine": machine(where), "tokens": tokens, "width": width, "ms": results})


if __name__ == "__main__":
    run(main, __doc__)
