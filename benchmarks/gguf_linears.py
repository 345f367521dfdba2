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

import torch
from torch import Tensor, nn

from benchmarks.common import machine, markdown
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


def median_milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Measures the median of the times, after two runs that do not count."""
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[2:])


def peer_linear(packed: Tensor, kind: str, columns: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Builds diffusers' layer with the same bytes."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    layer = GGUFLinear(columns, len(packed), bias=False, compute_dtype=dtype, device="meta")
    layer.weight = GGUFParameter(packed, quant_type=gguf.GGMLQuantizationType[kind])
    return layer


@torch.inference_mode()
def main(
    kinds: Words = ("Q8_0", "Q4_K"),
    tokens: int = 4608,
    device: str = "auto",
    output: str | None = None,
    toy: bool = False,
) -> None:
    """Runs the benchmark.

    Args:
        kinds: kinds of GGUF blocks
        tokens: number of tokens
        device: where to run: "auto", "cpu", "cuda", "cuda:1"
        output: JSON file to write to; if not set, none is written
        toy: measure tiny layers, on any machine
    """
    where, width = pick_device(device), 256 if toy else 3072
    tokens = 64 if toy else tokens
    results = {}
    for kind in kinds:
        per_block, size = BLOCKS[kind]
        total = dict.fromkeys(("plain", "ours", "ours compiled", "diffusers"), 0.0)
        for rows, columns, count, share in SHAPES:
            rows, columns = rows * width, columns * width
            packed = torch.randint(256, (rows, columns // per_block * size), dtype=torch.uint8, device=where)
            batch = max(1, round(share * tokens))
            x = torch.randn(batch, columns, dtype=torch.bfloat16, device=where)
            torch._dynamo.reset()  # each shape is compiled separately, as each block is
            plain = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=where)
            ours = PackedLinear(packed, kind, None, None, torch.bfloat16)
            layers = {
                "plain": plain,
                "ours": ours,
                "ours compiled": torch.compile(ours, fullgraph=True),
                "diffusers": peer_linear(packed, kind, columns),
            }
            for name, layer in layers.items():
                total[name] += count * median_milliseconds(partial(layer, x), where)
        results[kind] = total
    names = list(next(iter(results.values())))
    rows = [[kind, *(f"{times[name]:.1f}" for name in names)] for kind, times in results.items()]
    print(markdown(["ms a step", *names], rows))
    if output:
        write_json(output, {"machine": machine(where), "tokens": tokens, "width": width, "ms": results})


if __name__ == "__main__":
    run(main, __doc__)
