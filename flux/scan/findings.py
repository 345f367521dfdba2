"""The findings of a scan, or of another study of layers, as plots and the report show them."""

from dataclasses import dataclass

import numpy as np

from flux.metrics.base import Metric
from flux.metrics.table import METRICS
from flux.scan.layers import ScoredSet, scored_sets
from flux.scan.scores import Rule, Scores


@dataclass(frozen=True, eq=False)
class Findings:
    """The scores of a study by its first metric, and the layers that a rule chooses by them.

    Attributes:
        sets: Each set of layers with its vitality, in the order of the columns of `change`.
        change: The change of each image to its reference, "rows sets". A row is a prompt with one seed.
        prompts: The prompt of each row.
        vital: The chosen layers, sorted.
        threshold: The vitality from which the rule chooses layers. None for other rules.
        change_name: What `change` is, see `flux.metrics.base.Metric`.
    """

    sets: list[ScoredSet]
    change: np.ndarray
    prompts: list[str]
    vital: list[int]
    threshold: float | None = None
    change_name: str = Metric.change_name

    @classmethod
    def of(cls, scores: Scores, rule: Rule, num_double: int) -> "Findings":
        """Collect what a study has found.

        Args:
            scores: Its scores.
            rule: The rule that chooses layers.
            num_double: The number of the model's double-stream layers, which come first.
        """
        vital, first = scores.vital(rule), scores.metrics[0]
        sets = scored_sets(scores.vitality(), num_double, vital, scores.intervals())
        change, name = METRICS[first].change(scores.tables[first]), METRICS[first].change_name
        return cls(sets, change, scores.prompts or [""] * scores.num_rows, vital, rule.threshold, name)
