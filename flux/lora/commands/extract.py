"""A LoRA from the difference of two checkpoints of one model.

    python -m flux.lora extract tuned.safetensors --base base.safetensors --rank 32 --output x.safetensors

Each of FLUX.1's matrices, of which there are about 500, takes some seconds on a CPU: a GPU is much faster.
"""

from typing import Annotated

from pydantic import Field

from flux.lora.commands import Dtype
from flux.settings.fields import FilePath, Fraction, Text

POSITIONAL = "tuned"


def main(
    tuned: FilePath,
    base: FilePath,
    output: FilePath,
    rank: Annotated[int, Field(ge=1)] | None = None,
    share: Fraction | None = None,
    device: Text = "auto",
    dtype: Dtype = "bfloat16",
    force: bool = False,
) -> None:
    """Extract a LoRA.

    Args:
        tuned: file or folder of the transformer that the LoRA is to lead to
        base: file or folder of the transformer that it is to be added to
        output: file to write
        rank: rank of each matrix, at most
        share: share of each matrix's difference that is kept at least, as far as rank allows
        device: where to compute: "auto", "cpu", "cuda", "cuda:1"
        dtype: number format of the factors
        force: whether the output may be replaced
    """
    import torch

    from flux.lora.extract import extract
    from flux.runtime.devices import pick_device

    where, of_factors = pick_device(device), getattr(torch, dtype)
    options = {"rank": rank, "share": share, "force": force}
    kept = extract(base, tuned, output, device=where, dtype=of_factors, progress=True, **options)
    print(f"{output}: {100 * kept:.2f} % of the difference")
