"""A LoRA file with some of its layers only: those that matter, by an ablation or a report, or a list.

    python -m flux.lora prune x.safetensors --scores ablation.json --top 4 --output small.safetensors
    python -m flux.lora prune x.safetensors --layers '[26, 39]' --output small.safetensors

What stays is copied bit for bit. Exactly one of --top, --share and --layers is given.
"""

from typing import Annotated

from pydantic import Field

from flux.errors import InputError
from flux.settings.fields import FilePath, Fraction, LayerNumbers

POSITIONAL = "file"


def main(
    file: FilePath,
    output: FilePath,
    scores: FilePath | None = None,
    top: Annotated[int, Field(ge=1)] | None = None,
    share: Fraction | None = None,
    layers: LayerNumbers | None = None,
    outside: bool = True,
    force: bool = False,
) -> None:
    """Prune a LoRA file.

    Args:
        file: the LoRA file
        output: file to write
        scores: the ablation.json or report.json that says which layers matter
        top: keep this many layers, those with the largest scores
        share: keep as few layers as have this share of the sum of all scores
        layers: keep these layers
        outside: whether to keep changes outside the layers
        force: whether the output may be replaced
    """
    if sum(each is not None for each in (top, share, layers)) != 1:
        raise InputError("command line: expected exactly one of top, share and layers")
    if (layers is None) == (scores is None):
        needed = "top and share choose by scores" if scores is None else "layers are chosen without scores"
        raise InputError(f"command line: {needed}: give scores with top or share, or layers alone")

    from flux.lora.contents import open_lora
    from flux.lora.prune import choose_layers, prune, read_scores

    if layers is None and scores is not None:
        layers = tuple(choose_layers(read_scores(scores, open_lora(file)), top, share))
    kept = prune(file, output, layers or (), outside=outside, force=force)
    print(f"{output}: layers {', '.join(map(str, kept))}")
