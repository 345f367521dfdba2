"""A LoRA from the difference of two checkpoints of one model, by singular values."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from flux.errors import InputError
from flux.files import write_bytes
from flux.lora.pairs import Pair, Pairs, check_output, tensors_of
from flux.model import Flux, FluxParams
from flux.specs import configs
from flux.weights.checkpoint import Checkpoint, open_checkpoint
from flux.weights.load import match_names, on_meta
from flux.weights.save import safetensors_bytes
from flux.weights.sources import TensorSource, find_sources

CPU = torch.device("cpu")
NOISE = 1e-6
"""Singular values below this part of the largest one are roundings of the two files."""


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    share: float | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    progress: bool = False,
) -> float:
    """Write the difference of two checkpoints as a LoRA file of BFL's form.

    Biases that differ are written whole, and so are the scales of norms.

    Args:
        base: File or folder of the transformer that the LoRA is to be added to.
        tuned: File or folder of the transformer that it is to lead to.
        output: The file to write.
        rank: Rank of each matrix, at most.
        share: Share of the squares of each matrix's difference that is kept at least, 0..1, as far as `rank`
            allows. If None, as much as `rank` allows.
        device: Where singular values are computed.
        dtype: The dtype of the factors in the file.
        force: Whether `output` may be replaced.
        progress: Whether to show a progress bar.

    Returns:
        The share of the squares of all differences of matrices that the file has.

    Raises:
        InputError: Neither rank nor share is given, the checkpoints are of different models or do not differ,
            or the output exists or cannot be written.
    """
    if rank is None and share is None:
        raise InputError("Got neither rank nor share: say how much of the difference is to be kept")
    path = check_output(output, force)
    params, sources = _of_one_model(open_checkpoint(Path(base), "transformer"))
    _, others = _of_one_model(open_checkpoint(Path(tuned), "transformer"), params)
    device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    found = _Differences(params, rank, share, device)
    for name, source in tqdm(sources.items(), "extract", unit="tensor", disable=not progress):
        found.add(name, *(each.read(CPU, torch.float32) for each in (source, others[name])))
    tensors = tensors_of(found.pairs, "bfl", dtype)[0] | {n: x.to(dtype) for n, x in found.norms.items()}
    if not tensors:
        raise InputError(f"Got {base} and {tuned}, which do not differ: there is nothing to extract")
    metadata = {"format": "pt", "extracted_from": Path(tuned).name, "base_model": Path(base).name}
    write_bytes(path, safetensors_bytes(tensors, metadata))
    return found.kept / found.whole if found.whole else 1.0


class _Differences:
    """The differences of two checkpoints, as far as they have been read.

    Attributes:
        pairs: Those of linear layers: low-rank changes of matrices, and biases.
        norms: The tuned checkpoint's scales of norms that differ.
        whole: The squares of all differences of matrices.
        kept: Those of them that the low-rank changes have.
    """

    def __init__(self, params: FluxParams, rank: int | None, share: float | None, device: torch.device | str):
        self.linears = {n for n, m in on_meta(Flux, params).named_modules() if isinstance(m, nn.Linear)}
        self.rank, self.share, self.device = rank, share, device
        self.pairs, self.norms = Pairs(replace(params, guidance_embed=True)), dict[str, Tensor]()
        self.whole = self.kept = 0.0

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Add the difference of one tensor of the model."""
        module, _, leaf = name.rpartition(".")
        difference = after - before
        if not difference.any():
            return
        if module not in self.linears:
            self.norms[name] = after
        elif leaf == "bias":
            self.pairs.biases[module] = difference
        else:
            down, up, square = low_rank(difference.to(self.device), self.rank, self.share)
            self.pairs.pairs[module] = [Pair(0, down.cpu(), up.cpu())]
            self.whole += float(difference.double().square().sum())
            self.kept += square


def low_rank(matrix: Tensor, rank: int | None, share: float | None) -> tuple[Tensor, Tensor, float]:
    """The best product of two factors for a matrix.

    The singular values are found from the products of its rows, or of its columns, whichever are fewer.

    Args:
        matrix: "rows columns".
        rank: The largest rank.
        share: The share of the matrix's squares to be kept. If None, as much as the rank allows.

    Returns:
        down "rank columns" and up "rows rank", in float32, and the squares that their product has.
    """
    x = matrix.double()
    x = x if x.shape[0] <= x.shape[1] else x.T
    squares, vectors = torch.linalg.eigh(x @ x.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    count = int((squares > NOISE**2 * squares[0]).sum())
    if share is not None:
        so_far = squares.cumsum(0)
        count = min(count, int((so_far < share * so_far[-1]).sum()) + 1)
    count = count if rank is None else min(count, rank)
    roots = squares[:count] ** 0.25  # both factors get the same lengths
    left = vectors[:, :count] * roots
    right = (vectors[:, :count] / roots).T @ x
    up, down = (left, right) if matrix.shape[0] <= matrix.shape[1] else (right.T, left.T)
    return down.float(), up.float(), float(squares[:count].sum())


def _of_one_model(
    checkpoint: Checkpoint, expected: FluxParams | None = None
) -> tuple[FluxParams, Mapping[str, TensorSource]]:
    """The sizes of the model that a checkpoint is of, and how its tensors are made.

    Raises:
        InputError: It is of no known model, or of another one than expected.
    """
    takes_guidance, _ = find_sources(checkpoint, "transformer", ["guidance_in.in_layer.weight"])
    errors = []
    for params in [expected] if expected else [spec.params for spec in configs.values()]:
        own = params if expected else replace(params, guidance_embed=bool(takes_guidance))
        try:
            return own, match_names(on_meta(Flux, own), checkpoint, "transformer")
        except InputError as error:
            errors.append(error)
    raise errors[0]
