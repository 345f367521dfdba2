"""LoRA files in another form, several as one, or merged into a model's weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flux.errors import InputError, warn
from flux.files import write_file
from flux.lora.contents import OpenLora, open_lora, open_loras
from flux.lora.pairs import (
    DTYPES,
    ENCODERS,
    Form,
    Pairs,
    check_output,
    form_of,
    read_pairs,
    stored_dtype,
    write_pairs,
)
from flux.model import Flux, FluxParams
from flux.specs import configs
from flux.weights.checkpoint import Checkpoint, open_checkpoint
from flux.weights.load import on_meta
from flux.weights.open_model import LoraUse, ModelFiles, OpenModel


def convert(
    file: str | Path,
    output: str | Path,
    form: Form,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Write a LoRA file in another form.

    Args:
        file: The LoRA file.
        output: The file to write.
        form: "kohya", "bfl" or "diffusers".
        dtype: The dtype of its factors. If None, that of `file`.
        force: Whether `output` may be replaced.

    Raises:
        InputError: The file is no LoRA, or one of another kind than pairs of factors; or the output exists or
            cannot be written.
    """
    path, lora = check_output(output, force), open_lora(file)
    metadata = lora.file.checkpoint.metadata
    write_pairs(path, read_pairs(lora), form, dtype or stored_dtype(lora), metadata)


def merge(
    files: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    form: Form | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> None:
    """Write the sum of several LoRAs as one file. Their ranks add up, so the sum is exact.

    Args:
        files: The LoRA files.
        output: The file to write.
        weights: The factor of each. If None, 1 for all.
        form: "kohya", "bfl" or "diffusers". If None, that of the first file.
        dtype: The dtype of the factors. If None, that of the first file.
        force: Whether `output` may be replaced.

    Raises:
        InputError: As `convert`; or the files are for different models, or there is not a weight for each.
    """
    path, opened = check_output(output, force), open_loras(files)
    total = Pairs(opened[0].params)
    for lora, weight in zip(opened, _weights(files, weights), strict=True):
        total.add(read_pairs(lora), weight)
    metadata = {key: text for lora in reversed(opened) for key, text in lora.file.checkpoint.metadata.items()}
    write_pairs(path, total, form or form_of(opened[0]), dtype or stored_dtype(opened[0]), metadata)


def merge_into(
    base: str | Path,
    files: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    *,
    force: bool = False,
) -> str:
    """Write a transformer with LoRAs of any form merged into its weights, under BFL's names.

    Args:
        base: File or folder of the transformer.
        files: The LoRA files. Changes to text encoders are left out.
        output: The file to write.
        weights: The factor of each LoRA. If None, 1 for all.
        force: Whether `output` may be replaced.

    Returns:
        The name of the model that the file can be loaded as.

    Raises:
        InputError: A LoRA does not fit the transformer, a sum is too large for the dtype of its weights, or
            the output exists or cannot be written.
    """
    path, opened = check_output(output, force), open_loras(files)
    for lora in opened:
        if lora.text_encoders:
            encoders = " and ".join(ENCODERS[part] for part in lora.text_encoders)
            warn(f"{lora.path}: its changes to {encoders} are left out: a transformer's file has none")
    uses = [LoraUse(Path(f), weight) for f, weight in zip(files, _weights(files, weights), strict=True)]
    checkpoint = open_checkpoint(Path(base), "transformer")
    name, model = _open_model(checkpoint, opened[0], uses)
    transformer = model.load_transformer("cpu", _dtype_of(checkpoint))
    tensors = _expanded(transformer, configs[name].params)
    for parameter, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(
                f"Cannot write {path}: {parameter} has a number too large for {tensor.dtype}: "
                "give smaller weights"
            )
    _save_large(path, tensors)
    return name


def _expanded(transformer: Flux, params: FluxParams) -> dict[str, Tensor]:
    """The tensors of a transformer's state dict, by BFL's names. Packed matrices are expanded."""
    tensors: dict[str, Tensor] = {}
    for parameter in on_meta(Flux, params).state_dict():
        module, _, leaf = parameter.rpartition(".")
        # Of packed layers, `weight` is the expanded matrix.
        tensors[parameter] = getattr(transformer.get_submodule(module), leaf).contiguous()
    return tensors


def _save_large(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file that is too large to be made in memory first. Raises InputError as `write_file`."""

    def write(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors would let nobody else read the file
        try:
            save_file(tensors, partial, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        partial.chmod(mode)

    write_file(path, write)


def _weights(files: Sequence[str | Path], weights: Sequence[float] | None) -> Sequence[float]:
    if weights is not None and len(weights) != len(files):
        raise InputError(f"Got {len(files)} LoRAs and {len(weights)} weights, expected a weight for each")
    return weights or [1.0] * len(files)


def _open_model(checkpoint: Checkpoint, lora: OpenLora, uses: Sequence[LoraUse]) -> tuple[str, OpenModel]:
    """The first of the models that a LoRA fits whose weights these are, opened with the LoRAs."""
    errors = []
    for name in lora.models:
        files = ModelFiles(*[checkpoint.path] * 3, loras=tuple(uses))
        model = OpenModel(configs[name], files)
        try:
            _ = model.transformer
        except InputError as error:
            errors.append(error)
            continue
        return name, model
    raise errors[0]


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of a checkpoint's numbers, or bfloat16 if it is packed."""
    kinds = [tensor.kind for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2]
    return DTYPES.get(max(kinds, key=kinds.count, default=""), torch.bfloat16)
