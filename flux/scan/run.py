"""A whole scan: skip each layer, score the images, choose the vital layers and publish them."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flux.loaded_model import LoadedModel
from flux.metrics.base import Metric
from flux.metrics.table import METRICS, load_metrics
from flux.runtime.devices import pick_device
from flux.scan.layers import REFERENCE, LayerSet, scored_sets
from flux.scan.plots import plot_vitality
from flux.scan.publish import publish
from flux.scan.scores import Rule, Scores, is_settled
from flux.scan.similarity import gather, score_row
from flux.scan.skipper import SkipTask
from flux.scan.sweep import Sweep, image_path
from flux.settings.resolved import ResolvedScan, ResolvedSkip
from flux.specs import encoder_of, get_spec

REDRAW_SECONDS = 2.0  # between two drawings of a growing vitality.png

RowSimilarities = Mapping[str, Sequence[float]]  # for each metric, the similarities of one reference's images


@dataclass(frozen=True)
class ScanProgress:
    """A report of a running scan.

    Attributes:
        done: The number of images that are there.
        total: The number of images of the whole scan.
        new_images: The paths of the images since the last report.
        vitality: The mean change of each set of layers over the images scored so far, by the first metric.
        plot: The path of vitality.png if these vitalities were drawn just now, else None.
    """

    done: int
    total: int
    new_images: list[Path]
    vitality: dict[LayerSet, float]
    plot: Path | None


def scan(
    settings: ResolvedScan,
    pipe: LoadedModel | None = None,
    *,
    progress: bool = True,
    on_progress: Callable[[ScanProgress], None] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    shown_settings: Mapping[str, Any] | None = None,
    remember: bool = True,
) -> list[int]:
    """Make the images of a sweep, score them, and publish the result in the same folder.

    If `stop_when` is "stable", the scan ends once the references before the last one settle the vital set
    (`flux.scan.scores.is_settled`): the last one is still being scored while the next is made.

    Args:
        settings: The settings of the scan.
        pipe: The model. If None, it is loaded once there is something to make.
        progress: Whether to show a progress bar.
        on_progress: Called after each batch of images. An exception from it ends the scan. Images are then
            scored batch by batch, between the batches of the sweep. Without it, they are scored reference by
            reference in a thread, which is faster.
        metrics: The metrics by name. If None, those that the settings name are loaded.
        shown_settings: As for `publish`.
        remember: As for `publish`.

    Returns:
        The vital layers.

    Raises:
        InputError: As `Sweep`, `load_metrics`, `score_row` and `publish`.
    """
    sweep, rule = Sweep(settings), Rule.of(settings)
    sources = {"dino": encoder_of(settings.encoder or settings.model)}
    if metrics is None:
        metrics = load_metrics(settings.metrics, sources, pick_device(settings.device))

    def may_stop(row: int, rows_before: Callable[[], Sequence[RowSimilarities]]) -> bool:
        if settings.stop_when == "never" or row == 0 or not is_settled(_scores(sweep, rows_before()), rule):
            return False
        print(f"the vital layers are settled after {row} references")
        return True

    if on_progress:
        rows = _score_batches(sweep, pipe, metrics, may_stop, on_progress, progress)
    else:
        rows = _score_rows(sweep, pipe, metrics, may_stop, progress)
    return publish(sweep.folder, sweep.folder, _scores(sweep, rows), rule, sources, shown_settings, remember)


def _bar_name(settings: ResolvedSkip) -> str:
    """Name the progress bar. The total and the time left of a scan that may stop early are upper bounds."""
    may_stop = isinstance(settings, ResolvedScan) and settings.stop_when == "stable"
    return "skip, at most" if may_stop else "skip"


MayStop = Callable[[int, Callable[[], Sequence[RowSimilarities]]], bool]


def _score_rows(
    sweep: Sweep, pipe: LoadedModel | None, metrics: Mapping[str, Metric], may_stop: MayStop, progress: bool
) -> list[RowSimilarities]:
    """Run the sweep, and score each finished reference in a thread while the next ones are made."""
    rows: list[Future[dict[str, list[float]]]] = []
    with ThreadPoolExecutor(1) as scorer:

        def on_row(row: int) -> bool:
            for scored in rows:
                if scored.done():
                    scored.result()  # raises its error now, not after hours
            rows.append(scorer.submit(score_row, sweep.folder, row, sweep.layer_sets, metrics))
            return may_stop(row, lambda: [scored.result() for scored in rows[:row]])

        try:
            sweep.run(pipe, on_row, progress=progress, name=_bar_name(sweep.settings))
        except BaseException:
            scorer.shutdown(wait=False, cancel_futures=True)
            raise
        sweep.finish()
        return [scored.result() for scored in rows]


def _score_batches(
    sweep: Sweep,
    pipe: LoadedModel | None,
    metrics: Mapping[str, Metric],
    may_stop: MayStop,
    on_progress: Callable[[ScanProgress], None],
    progress: bool,
) -> list[RowSimilarities]:
    """Run the sweep, score each batch once it is written, and report the vitalities so far."""
    batches = _BatchScorer(sweep, metrics, on_progress)
    sweep.run(
        pipe,
        lambda row: may_stop(row, lambda: batches.rows(row)),
        batches.add,
        progress,
        _bar_name(sweep.settings),
    )
    sweep.finish()
    return batches.rows(sweep.rows_done)


class _BatchScorer:
    """The similarities of a running sweep, batch by batch."""

    def __init__(
        self, sweep: Sweep, metrics: Mapping[str, Metric], on_progress: Callable[[ScanProgress], None]
    ):
        self.sweep, self.metrics, self.on_progress = sweep, metrics, on_progress
        self.num_double = get_spec(sweep.settings.model).params.depth
        self.similarities: list[dict[str, dict[LayerSet, float]]] = [
            {name: {} for name in metrics} for _ in sweep.settings.entries
        ]
        self.done = 0
        self.drawn = 0.0  # when vitality.png was last drawn

    def add(self, task: SkipTask) -> None:
        """Score the images of a task and report them."""
        folder = self.sweep.folder
        skipped = [layers for layers in task.layer_sets if layers != REFERENCE]
        if skipped:
            for name, values in score_row(folder, task.row, skipped, self.metrics).items():
                self.similarities[task.row][name].update(zip(skipped, values))
        self.done += len(task.layer_sets)
        vitality, plot = self.vitality(), None
        if vitality and time.perf_counter() - self.drawn > REDRAW_SECONDS:
            plot = folder / "vitality.png"
            plot_vitality(scored_sets(vitality, self.num_double), plot)
            self.drawn = time.perf_counter()
        images = [image_path(folder, task.row, layers) for layers in task.layer_sets]
        self.on_progress(ScanProgress(self.done, self.sweep.num_images, images, vitality, plot))

    def vitality(self) -> dict[LayerSet, float]:
        """Return the mean change of each set that has been scored so far."""
        first = next(iter(self.metrics))
        known = {
            layers: [row[first][layers] for row in self.similarities if layers in row[first]]
            for layers in self.sweep.layer_sets
        }
        change = METRICS[first].change
        return {layers: float(change(np.array(values)).mean()) for layers, values in known.items() if values}

    def rows(self, count: int) -> list[RowSimilarities]:
        """Return the similarities of the first references, which must be complete."""
        return [
            {name: [values[layers] for layers in self.sweep.layer_sets] for name, values in row.items()}
            for row in self.similarities[:count]
        ]


def _scores(sweep: Sweep, rows: Sequence[RowSimilarities]) -> Scores:
    prompts = [entry.prompt for entry in sweep.settings.entries[: len(rows)]]
    return gather(sweep.layer_sets, rows, prompts)
