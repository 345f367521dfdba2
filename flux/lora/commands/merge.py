"""Several LoRA files as one, or merged into a model's weights.

    python -m flux.lora merge x.safetensors y.safetensors --weights '[1, 0.5]' --output both.safetensors
    python -m flux.lora merge x.safetensors --base flux1-dev.safetensors --output merged.safetensors

Ranks add up, so that one file does exactly what the several did. LoRAs of any form can be merged into a
model's weights.
"""

from typing import Annotated

from pydantic import Field

from flux.errors import InputError
from flux.lora.commands import Dtype, FormName
from flux.settings.fields import FilePath

POSITIONAL = "files"


def main(
    files: Annotated[tuple[FilePath, ...], Field(strict=False, min_length=1)],
    output: FilePath,
    weights: Annotated[tuple[float, ...], Field(strict=False, min_length=1)] | None = None,
    base: FilePath | None = None,
    form: FormName | None = None,
    dtype: Dtype | None = None,
    force: bool = False,
) -> None:
    """Merge LoRA files.

    Args:
        files: LoRA files for one model
        output: file to write
        weights: the factor of each LoRA; if None, 1
        base: file or folder of a transformer to merge them into
        form: whose names the LoRA gets; if None, those of the first file
        dtype: number format of the LoRA's factors; if None, that of the first file
        force: whether the output may be replaced
    """
    if base is not None and (form or dtype):
        raise InputError("command line: form and dtype are those of a LoRA file: leave them out with base")

    import torch

    from flux.lora.merge import merge, merge_into

    if base is not None:
        model = merge_into(base, files, output, weights, force=force)
        print(f"{output}: load it as {model}")
        return
    merge(files, output, weights, form=form, dtype=getattr(torch, dtype) if dtype else None, force=force)
    print(output)
