"""A LoRA file in another form, so that other programs load it.

    python -m flux.lora convert x.safetensors --form diffusers --output y.safetensors

kohya's form loads in ComfyUI, Forge and kohya's tools, diffusers' form in diffusers, ai-toolkit and ComfyUI,
BFL's form in BFL's own package and ComfyUI.
"""

from flux.lora.commands import Dtype, FormName
from flux.settings.fields import FilePath

POSITIONAL = "file"


def main(
    file: FilePath,
    output: FilePath,
    form: FormName,
    dtype: Dtype | None = None,
    force: bool = False,
) -> None:
    """Convert a LoRA file.

    Args:
        file: the LoRA file
        output: file to write
        form: whose names it gets
        dtype: number format of its factors; if None, that of the file
        force: whether the output may be replaced
    """
    import torch

    from flux.lora.merge import convert

    convert(file, output, form, dtype=getattr(torch, dtype) if dtype else None, force=force)
    print(output)
