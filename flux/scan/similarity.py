"""Similarities of a sweep's images to their references, by several metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from flux.errors import InputError
from flux.images.io import read_image
from flux.metrics.base import Metric
from flux.metrics.features import CHUNK
from flux.scan.layers import REFERENCE, LayerSet
from flux.scan.scores import DECIMALS, Scores
from flux.scan.sweep import image_path, read_sweep


def score_row(
    folder: Path, row: int, layer_sets: Sequence[LayerSet], metrics: Mapping[str, Metric]
) -> dict[str, list[float]]:
    """Compare images of one reference with it. At most CHUNK of the images are in memory at once.

    Args:
        folder: The folder of a sweep.
        row: The number of the reference.
        layer_sets: The skipped layers of each image to compare.
        metrics: The metrics by name.

    Returns:
        For each metric, the similarities in the order of `layer_sets`.

    Raises:
        InputError: An image cannot be read, or does not have the size of its reference.
    """
    reference = _read(image_path(folder, row, REFERENCE))
    similarities: dict[str, list[float]] = {name: [] for name in metrics}
    for start in range(0, len(layer_sets), CHUNK):
        paths = [image_path(folder, row, layers) for layers in layer_sets[start : start + CHUNK]]
        images = [_read(path) for path in paths]
        for path, image in zip(paths, images):
            if image.size != reference.size:
                width, height = reference.size
                raise InputError(
                    f"Got images of unequal size: {path} has {image.width}x{image.height} pixels, its "
                    f"reference {width}x{height}: delete it and run the sweep again"
                )
        for name, metric in metrics.items():
            similarities[name] += metric.compare([reference] * len(images), images)
    return similarities


def _read(path: Path) -> Image:
    """Read an image of a sweep. Raise InputError if the file is damaged."""
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(f"{error}. Delete it and run the sweep again") from error


def gather(
    layer_sets: Sequence[LayerSet], rows: Sequence[Mapping[str, Sequence[float]]], prompts: Sequence[str]
) -> Scores:
    """Make scores of what `score_row` returned for each row, and of the rows' prompts."""
    tables = {name: np.round([row[name] for row in rows], DECIMALS) for name in rows[0]}
    return Scores(list(layer_sets), tables, list(prompts))


def score(folder: Path, metrics: Mapping[str, Metric], progress: bool = True) -> Scores:
    """Score the folder of a finished sweep.

    Args:
        folder: The folder.
        metrics: The metrics by name, as `load_metrics` returns them.
        progress: Whether to show a progress bar.

    Raises:
        InputError: As `read_sweep`, `score_row` and `Scores`.
    """
    _, layer_sets, entries = read_sweep(folder)
    with tqdm(range(len(entries)), desc="score", unit="prompt", disable=not progress) as numbers:
        rows = [score_row(folder, row, layer_sets, metrics) for row in numbers]
    return gather(layer_sets, rows, [entry.prompt for entry in entries])
