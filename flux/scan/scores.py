"""Which layers are vital: how far each bypass moves the picture, how sure that is, and which layers stand
out (Stable Flow, arXiv 2411.14430, section 3.1).

`score` reads the folder of a finished sweep into `Scores`, a `Rule` selects, `write_scores` writes it all
down. Outside the nets that some metrics bring along, everything is numpy in float64.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from flux.errors import InputError
from flux.files import write_text
from flux.images.io import read_image
from flux.metrics.base import Metric
from flux.metrics.features import CHUNK
from flux.metrics.table import METRICS
from flux.scan.sweep import REFERENCE, LayerSet, check_sweep, layers_text, picture_path

if TYPE_CHECKING:
    from flux.settings.demos import SelectionSettings

DECIMALS = 6  # of similarities and vitalities: what the files show is what ties and thresholds go by
RESAMPLES = 2000
MIN_PROMPTS = 8  # a percentile interval from fewer is much too narrow
SURE = 0.95


# ---- selection


@dataclass(frozen=True)
class Rule:
    """Which layers are vital, given their vitalities. Exactly one of the three is given:

    threshold: those of at least this vitality (equation 2); there may be none.
    top: this many, the most vital; of equally vital layers the lower numbers come first.
    gap: sorted by falling vitality, those before the widest gap between neighbours, hence at least one and
        never all; of equally wide gaps the first counts. If there is no gap at all, as with one layer or
        with all equally vital, no layer is set apart and all are taken.
    """

    top: int | None = None
    threshold: float | None = None
    gap: bool = False

    def __post_init__(self):
        if (self.top is not None) + (self.threshold is not None) + self.gap != 1:
            raise ValueError(f"{self} is no rule: exactly one of top, threshold and gap is expected")

    @classmethod
    def of(cls, settings: "SelectionSettings") -> "Rule":
        """The rule in the settings of a demo or a scan."""
        return cls(settings.top, settings.threshold, bool(settings.gap))

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}

    def choose(self, vitality: np.ndarray) -> np.ndarray:
        """Vitalities by rising layer number, "... layers" -> whether each is vital, the same shape; every
        row of it on its own.
        """
        if self.threshold is not None:
            return vitality >= self.threshold
        order = np.argsort(-vitality, axis=-1, kind="stable")
        count = vitality.shape[-1]
        taken = count if self.top is None else self.top
        if self.gap and count > 1:
            ranked = np.take_along_axis(vitality, order, axis=-1)
            # Rounded like the vitalities, so that gaps that are equal in the files are equal here.
            gaps = np.round(-np.diff(ranked, axis=-1), DECIMALS)
            widest = gaps.argmax(axis=-1, keepdims=True)
            taken = np.where(gaps.max(axis=-1, keepdims=True) > 0, widest + 1, count)
        chosen = np.zeros(vitality.shape, dtype=bool)
        places = np.broadcast_to(np.arange(count) < taken, vitality.shape)
        np.put_along_axis(chosen, order, places, axis=-1)
        return chosen


# ---- scores


@dataclass(frozen=True)
class Scores:
    """Similarities of bypassed pictures to their references, and what follows from them.

    Wherever a metric may be named, None stands for the first one.

    Attributes:
        sets: the sets of layers that were bypassed; single layers among them are candidates for being vital.
        tables: by metric, similarities "rows sets"; a row is one reference and its bypassed pictures.
        prompts: of each row the prompt; several rows of one prompt differ in the seed. None: all differ.

    Raises:
        InputError: a similarity that is no finite number.
    """

    sets: list[LayerSet]
    tables: dict[str, np.ndarray]
    prompts: list[str] | None = None

    def __post_init__(self):
        for metric, table in self.tables.items():
            for row, column in np.argwhere(~np.isfinite(table)):
                raise InputError(
                    f"Got {table[row, column]} as the {metric} similarity of prompt {row} without layers "
                    f"{layers_text(self.sets[column])}: look at that picture and at the metric's net"
                )

    @property
    def metrics(self) -> list[str]:
        return list(self.tables)

    @property
    def num_rows(self) -> int:
        return len(self._change(None))

    @property
    def layers(self) -> list[int]:
        """The layers that were bypassed alone, sorted: the candidates."""
        return sorted(layers[0] for layers in self.sets if len(layers) == 1)

    def part(self, rows: Sequence[int]) -> "Scores":
        """The scores of these rows alone."""
        rows = list(rows)
        prompts = None if self.prompts is None else [self.prompts[row] for row in rows]
        return Scores(self.sets, {name: table[rows] for name, table in self.tables.items()}, prompts)

    def vitality(self, metric: str | None = None) -> dict[LayerSet, float]:
        """The mean change over all rows, by set.

        With dino, clip and ssim that is 1 minus the mean similarity, equation 1 of the paper; with lpips the
        mean distance; with psnr the mean of the root mean square errors (`Psnr.change`). More is more vital.
        """
        return dict(zip(self.sets, np.round(self._change(metric).mean(axis=0), DECIMALS).tolist()))

    def vital(self, rule: Rule, metric: str | None = None) -> list[int]:
        """The vital layers, sorted; sets of several layers are no candidates."""
        vitality = self.vitality(metric)
        chosen = rule.choose(np.array([vitality[(layer,)] for layer in self.layers]))
        return [layer for layer, is_vital in zip(self.layers, chosen) if is_vital]

    def resampled(self, metric: str | None = None) -> np.ndarray:
        """Vitalities of RESAMPLES bootstrap samples, "samples sets"; the same ones at every call.

        Each draws as many prompts as there are, with repeats, and takes all rows of a drawn prompt along,
        since pictures of one prompt are alike. With fewer than MIN_PROMPTS prompts there are no samples.
        """
        change = self._change(metric)
        names, group = np.unique(self.prompts or np.arange(len(change)), return_inverse=True)
        if len(names) < MIN_PROMPTS:
            return np.empty((0, len(self.sets)))
        draws = np.random.default_rng(0).multinomial(
            len(names), np.full(len(names), 1 / len(names)), RESAMPLES
        )
        weights = draws[:, group] / draws[:, group].sum(axis=1, keepdims=True)
        return np.round(weights @ change, DECIMALS)

    def intervals(self, metric: str | None = None) -> dict[LayerSet, tuple[float, float]]:
        """Each set's 95 % percentile bootstrap interval of the vitality; empty for fewer than MIN_PROMPTS
        prompts.
        """
        samples = self.resampled(metric)
        if not len(samples):
            return {}
        low, high = np.round(np.quantile(samples, (0.025, 0.975), axis=0), DECIMALS).tolist()
        return dict(zip(self.sets, zip(low, high)))

    def membership(self, rule: Rule, metric: str | None = None) -> dict[int, float]:
        """Of each candidate the share of the bootstrap samples whose vital layers it is among; empty for
        fewer than MIN_PROMPTS prompts.
        """
        samples = self.resampled(metric)
        if not len(samples):
            return {}
        columns = [self.sets.index((layer,)) for layer in self.layers]
        return dict(zip(self.layers, rule.choose(samples[:, columns]).mean(axis=0).tolist()))

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Spearman's rank correlation between the vitalities of all sets by one metric and by each later
        one.
        """
        values = {metric: list(self.vitality(metric).values()) for metric in self.metrics}
        pairs = {a: self.metrics[i:] for i, a in enumerate(self.metrics, start=1)}
        return {
            a: {b: spearman(values[a], values[b]) for b in others} for a, others in pairs.items() if others
        }

    def csv(self) -> str:
        """One line for each row, set of layers and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["prompt", "layers", "metric", "similarity"])
        for row in range(self.num_rows):
            for column, layers in enumerate(self.sets):
                for metric, table in self.tables.items():
                    value = f"{table[row, column]:.{DECIMALS}f}"
                    writer.writerow([row, layers_text(layers), metric, value])
        return text.getvalue()

    def _change(self, metric: str | None) -> np.ndarray:
        metric = metric or self.metrics[0]
        return METRICS[metric].change(self.tables[metric])


def stable(scores: Scores, rule: Rule, metric: str | None = None) -> bool:
    """Whether the vital set is settled: each candidate is in it in at least 95 % or at most 5 % of the
    bootstrap samples over at least MIN_PROMPTS prompts.

    To ask again after each new prompt and to stop at the first yes asks more than once: that the set so found
    would come out again is then likely, but not at a guaranteed 95 %.
    """
    shares = scores.membership(rule, metric).values()
    return bool(shares) and all(share >= SURE or share <= 1 - SURE for share in shares)


def stable_after(scores: Scores, rule: Rule, metric: str | None = None) -> int | None:
    """After how many rows the set was settled for the first time; None: it is not yet."""
    counts = range(MIN_PROMPTS, scores.num_rows + 1)
    return next((count for count in counts if stable(scores.part(range(count)), rule, metric)), None)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation, in -1..1, equal values at the mean of their ranks; None if either has no
    order: fewer than two values, or all equal.
    """
    x, y = (_ranks(values) for values in (a, b))
    norm = np.sqrt((x @ x) * (y @ y))
    return round(float(x @ y / norm), DECIMALS) if norm else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks about their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place] - (len(values) + 1) / 2


# ---- folders and files


def score_prompt(
    folder: Path, number: int, sets: Sequence[LayerSet], metrics: Mapping[str, Metric]
) -> dict[str, list[float]]:
    """By metric, the similarities of the pictures of a sweep's row `number` to its reference, in the order
    of the sets. At most CHUNK of the pictures are in memory at once.

    Raises:
        InputError: a picture that cannot be read, or is not of its reference's size.
    """
    reference = read_image(picture_path(folder, number, REFERENCE))
    row: dict[str, list[float]] = {name: [] for name in metrics}
    for start in range(0, len(sets), CHUNK):
        paths = [picture_path(folder, number, layers) for layers in sets[start : start + CHUNK]]
        pictures = [read_image(path) for path in paths]
        for path, picture in zip(paths, pictures):
            if picture.size != reference.size:
                width, height = reference.size
                raise InputError(
                    f"Got pictures of unequal size: {path} has {picture.width}x{picture.height} pixels, its "
                    f"reference {width}x{height}: delete it and run the sweep again"
                )
        for name, metric in metrics.items():
            row[name] += metric.of([reference] * len(pictures), pictures)
    return row


def gather(
    sets: Sequence[LayerSet], rows: Sequence[Mapping[str, Sequence[float]]], prompts: Sequence[str]
) -> Scores:
    """The scores that rows of `score_prompt` make; the prompt of each."""
    tables = {name: np.round([row[name] for row in rows], DECIMALS) for name in rows[0]}
    return Scores(list(sets), tables, list(prompts))


def score(folder: Path, metrics: Mapping[str, Metric], progress: bool = True) -> Scores:
    """The similarities of a finished sweep, by the metrics of `load_metrics`.

    Raises:
        InputError: as `check_sweep`, `score_prompt` and `Scores`.
    """
    _, sets, entries = check_sweep(folder)
    with tqdm(range(len(entries)), desc="score", unit="prompt", disable=not progress) as numbers:
        rows = [score_prompt(folder, number, sets, metrics) for number in numbers]
    return gather(sets, rows, [entry.prompt for entry in entries])


def write_scores(
    folder: Path,
    scores: Scores,
    rule: Rule,
    *,
    model: str,
    checkpoint: str | None,
    protocol: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
) -> list[int]:
    """Writes similarity.csv and vital_layers.json; returns the vital layers by the first metric.

    Args:
        model: name of the model that was scanned; checkpoint: fingerprint of its weights.
        protocol: the settings of the sweep.
        sources: by metric, hub id or folder of its net.

    Raises:
        InputError: a file that cannot be written.
    """
    layers = scores.vital(rule)
    intervals, membership = scores.intervals(), scores.membership(rule)
    vitality = {}
    for entry, value in scores.vitality().items():
        about = {"vitality": value}
        if entry in intervals:
            about["low"], about["high"] = intervals[entry]
        if len(entry) == 1 and membership:
            about["membership"] = membership[entry[0]]
        vitality[layers_text(entry)] = about
    others = {
        metric: {layers_text(entry): value for entry, value in scores.vitality(metric).items()}
        for metric in scores.metrics[1:]
    }
    data = {
        "model": model,
        "checkpoint": checkpoint,
        "vital_layers": layers,
        "rule": {"metric": scores.metrics[0], **rule.to_json()},
        "stable": stable(scores, rule),
        "stable_after": stable_after(scores, rule),
        "rows": scores.num_rows,
        "vitality": vitality,
        "vitality_by_other_metrics": others,
        "agreement": scores.agreement(),
        "nets": dict(sources or {}),
        "protocol": dict(protocol),
    }
    write_text(folder / "similarity.csv", scores.csv())
    write_text(folder / "vital_layers.json", _readable(data) + "\n")
    return layers


def _readable(value: Any, indent: int = 0) -> str:
    """Indented JSON, but with each list and object of at most 90 characters on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if indent and len(line) <= 90 or not isinstance(value, dict | list | tuple):
        return line
    inner = indent + 2
    if isinstance(value, dict):
        ends, items = "{}", [f"{json.dumps(key)}: {_readable(item, inner)}" for key, item in value.items()]
    else:
        ends, items = "[]", [_readable(item, inner) for item in value]
    return f"{ends[0]}\n" + ",\n".join(" " * inner + item for item in items) + f"\n{' ' * indent}{ends[1]}"
