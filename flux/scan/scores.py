"""Vitality, its uncertainty, and the choice of vital layers (Stable Flow, arXiv 2411.14430, section 3.1).

The vitality of a layer is 1 minus the mean similarity of images without it to their references. `Scores`
holds the similarities, a `Rule` chooses. Everything is numpy in float64.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux.errors import InputError
from flux.metrics.table import METRICS
from flux.scan.layers import LayerSet, layers_text
from flux.settings.demos import SelectionSettings

DECIMALS = 6  # of similarities and vitalities; ties and thresholds are decided on the values in the files
RESAMPLES = 2000
MIN_PROMPTS = 8  # a percentile interval from fewer is much too narrow
SURE = 0.95


@dataclass(frozen=True)
class Rule:
    """A rule that chooses the vital layers by their vitalities. Exactly one of the three is given.

    Attributes:
        top: Choose this many layers, the most vital ones. Of equally vital layers, the lower numbers come
            first.
        threshold: Choose the layers of at least this vitality (equation 2). There may be none.
        gap: Sort the layers by falling vitality and choose those before the widest gap between neighbours,
            hence at least one and never all. Of equally wide gaps, the first counts. If there is no gap, as
            with one layer or with equally vital ones, choose all.
    """

    top: int | None = None
    threshold: float | None = None
    gap: bool = False

    def __post_init__(self):
        if (self.top is not None) + (self.threshold is not None) + self.gap != 1:
            raise ValueError(f"{self} is no rule: exactly one of top, threshold and gap is expected")

    @classmethod
    def of(cls, settings: SelectionSettings) -> "Rule":
        """Read the rule from the settings of demo 3 or a scan."""
        return cls(settings.top, settings.threshold, bool(settings.gap))

    def to_json(self) -> dict[str, Any]:
        """Return the one value that is given, by its name."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}

    def choose(self, vitality: np.ndarray) -> np.ndarray:
        """Decide for each layer whether it is vital.

        Args:
            vitality: Vitalities by rising layer number, "... layers". Each row is decided by itself.

        Returns:
            Booleans of the same shape.
        """
        if self.threshold is not None:
            return vitality >= self.threshold
        order = np.argsort(-vitality, axis=-1, kind="stable")
        num_layers = vitality.shape[-1]
        count: int | np.ndarray = num_layers if self.top is None else self.top
        if self.gap and num_layers > 1:
            ranked = np.take_along_axis(vitality, order, axis=-1)
            # Rounded like the vitalities, so that gaps that are equal in the files are equal here.
            gaps = np.round(-np.diff(ranked, axis=-1), DECIMALS)
            widest = gaps.argmax(axis=-1, keepdims=True)
            count = np.where(gaps.max(axis=-1, keepdims=True) > 0, widest + 1, num_layers)
        chosen = np.zeros(vitality.shape, dtype=bool)
        is_before = np.broadcast_to(np.arange(num_layers) < count, vitality.shape)
        np.put_along_axis(chosen, order, is_before, axis=-1)
        return chosen


@dataclass(frozen=True)
class Scores:
    """Similarities of images with skipped layers to their references, and what follows from them.

    Attributes:
        layer_sets: The sets of layers that were skipped. The single layers among them are the candidates.
        tables: For each metric, the similarities, "rows sets". A row is one reference and its images.
        prompts: The prompt of each row. Rows of one prompt differ in their seed. If None, all prompts differ.

    Raises:
        InputError: A similarity is not a finite number.
    """

    layer_sets: list[LayerSet]
    tables: dict[str, np.ndarray]
    prompts: list[str] | None = None

    def __post_init__(self):
        for metric, table in self.tables.items():
            for row, column in np.argwhere(~np.isfinite(table)):
                raise InputError(
                    f"Got {table[row, column]} as the {metric} similarity of prompt {row} without layers "
                    f"{layers_text(self.layer_sets[column])}: look at that image and at the metric's model"
                )

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics. The first one decides what is vital."""
        return list(self.tables)

    @property
    def num_rows(self) -> int:
        """The number of references."""
        return len(self._changes())

    @property
    def layers(self) -> list[int]:
        """The candidates: the layers that were skipped alone, sorted."""
        return sorted(layers[0] for layers in self.layer_sets if len(layers) == 1)

    def part(self, rows: Sequence[int]) -> "Scores":
        """Return the scores of these rows alone."""
        rows = list(rows)
        prompts = None if self.prompts is None else [self.prompts[row] for row in rows]
        return Scores(self.layer_sets, {name: table[rows] for name, table in self.tables.items()}, prompts)

    def vitality(self, metric: str | None = None) -> dict[LayerSet, float]:
        """Compute the mean change over all rows for each set of layers. More is more vital.

        For dino, clip and ssim it is 1 minus the mean similarity (equation 1), for lpips the mean distance,
        and for psnr the mean of the root mean square errors (`Psnr.change`). If `metric` is None, it is the
        first one.
        """
        return dict(zip(self.layer_sets, np.round(self._changes(metric).mean(axis=0), DECIMALS).tolist()))

    def vital(self, rule: Rule) -> list[int]:
        """Choose the vital layers among the candidates, sorted."""
        vitality = self.vitality()
        chosen = rule.choose(np.array([vitality[(layer,)] for layer in self.layers]))
        return [layer for layer, is_vital in zip(self.layers, chosen) if is_vital]

    def resampled(self) -> np.ndarray:
        """Compute the vitalities of RESAMPLES bootstrap samples, "samples sets", the same at every call.

        A sample draws as many prompts as there are, with repeats, and takes all rows of a drawn prompt, since
        the images of one prompt are alike. With fewer than MIN_PROMPTS prompts there are no samples.
        """
        changes = self._changes()
        names, group = np.unique(self.prompts or np.arange(len(changes)), return_inverse=True)
        if len(names) < MIN_PROMPTS:
            return np.empty((0, len(self.layer_sets)))
        draws = np.random.default_rng(0).multinomial(
            len(names), np.full(len(names), 1 / len(names)), RESAMPLES
        )
        weights = draws[:, group] / draws[:, group].sum(axis=1, keepdims=True)
        return np.round(weights @ changes, DECIMALS)

    def intervals(self) -> dict[LayerSet, tuple[float, float]]:
        """Compute the 95 % percentile bootstrap interval of each set's vitality.

        Empty with fewer than MIN_PROMPTS prompts.
        """
        samples = self.resampled()
        if not len(samples):
            return {}
        low, high = np.round(np.quantile(samples, (0.025, 0.975), axis=0), DECIMALS).tolist()
        return dict(zip(self.layer_sets, zip(low, high)))

    def membership(self, rule: Rule) -> dict[int, float]:
        """Compute for each candidate the fraction of bootstrap samples in which it is vital.

        Empty with fewer than MIN_PROMPTS prompts.
        """
        samples = self.resampled()
        if not len(samples):
            return {}
        columns = [self.layer_sets.index((layer,)) for layer in self.layers]
        return dict(zip(self.layers, rule.choose(samples[:, columns]).mean(axis=0).tolist()))

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Compute Spearman's rank correlation of the vitalities, for each metric and each later one."""
        values = {metric: list(self.vitality(metric).values()) for metric in self.metrics}
        pairs = {a: self.metrics[place:] for place, a in enumerate(self.metrics, start=1)}
        return {
            a: {b: spearman(values[a], values[b]) for b in others} for a, others in pairs.items() if others
        }

    def csv(self) -> str:
        """Write one line for each row, set of layers and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["prompt", "layers", "metric", "similarity"])
        for row in range(self.num_rows):
            for column, layers in enumerate(self.layer_sets):
                for metric, table in self.tables.items():
                    value = f"{table[row, column]:.{DECIMALS}f}"
                    writer.writerow([row, layers_text(layers), metric, value])
        return text.getvalue()

    def _changes(self, metric: str | None = None) -> np.ndarray:
        metric = metric or self.metrics[0]
        return METRICS[metric].change(self.tables[metric])


def is_settled(scores: Scores, rule: Rule) -> bool:
    """Whether the vital set is settled, over at least MIN_PROMPTS prompts.

    It is if each candidate is vital in at least 95 % or at most 5 % of the bootstrap samples. Asking again
    after each prompt and stopping at the first yes asks more than once: the same set would then be found
    again with high probability, but not with a guaranteed 95 %.
    """
    fractions = scores.membership(rule).values()
    return bool(fractions) and all(fraction >= SURE or fraction <= 1 - SURE for fraction in fractions)


def settled_after(scores: Scores, rule: Rule) -> int | None:
    """Return the number of rows after which the set was first settled, or None if it is not settled yet."""
    counts = range(MIN_PROMPTS, scores.num_rows + 1)
    return next((count for count in counts if is_settled(scores.part(range(count)), rule)), None)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Compute Spearman's rank correlation, -1..1. Equal values share the mean of their ranks.

    None if either has no order, i.e. fewer than two values or all equal.
    """
    x, y = (_centred_ranks(values) for values in (a, b))
    norm = np.sqrt((x @ x) * (y @ y))
    return round(float(x @ y / norm), DECIMALS) if norm else None


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    """Return each value's rank minus the mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place] - (len(values) + 1) / 2
