"""Measures edits: how well each keeps what it should keep, and follows its prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from flux.evaluate.benchmark import Item
from flux.evaluate.judge import Judge, Verdict
from flux.evaluate.methods import EditResult
from flux.evaluate.resolve import ResolvedEvaluate
from flux.evaluate.summary import ResultRow
from flux.metrics.edits import EditMetrics, MeasuredEdit
from flux.runtime.devices import pick_device
from flux.specs import encoder_of


class Measurer:
    """Measures edits with metrics and, if there is one, a judge.

    Raises:
        InputError: As `EditMetrics.load`.
    """

    def __init__(self, settings: ResolvedEvaluate, judge: Judge | None = None):
        device = pick_device(settings.device)
        encoder = encoder_of(settings.encoder or settings.model)
        self.metrics = EditMetrics.load(settings.metrics, encoder, settings.clip, device)
        self.settings, self.judge = settings, judge
        # The next edits are made meanwhile. On their stream, reading a number would wait for them.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def rows(self, method: str, items: Sequence[Item], results: Sequence[EditResult]) -> list[ResultRow]:
        """Measure one method's edits of some items: the rows of results.csv."""
        with torch.cuda.stream(self.stream):
            size = self.settings.size
            before = [result.reference or item.photo(*size) for item, result in zip(items, results)]
            after = [result.image for result in results]
            verdicts = self._verdicts(items, before, after)
            edits = [self._edit(*each) for each in zip(items, before, after, verdicts)]
            rows = []
            for item, result, verdict, scores in zip(items, results, verdicts, self.metrics.measure(edits)):
                if verdict:
                    scores |= {"success": float(verdict.success), "overlap": verdict.overlap}
                scores |= {"seconds": result.seconds, "evaluations": result.evaluations}
                scores |= {"mask_iou": result.mask_iou}
                rows.append(ResultRow(item.key, item.kind, method, scores))
            return rows

    def _verdicts(
        self, items: Sequence[Item], before: Sequence[Image.Image], after: Sequence[Image.Image]
    ) -> list[Verdict | None]:
        """Ask the judge about the items that say what to check. The verdict on the others is None."""
        verdicts: list[Verdict | None] = [None] * len(items)
        asked = {n: item.asked for n, item in enumerate(items) if item.asked}
        if self.judge and asked:
            own_before, own_after = ([images[n] for n in asked] for images in (before, after))
            for n, verdict in zip(asked, self.judge.judge(own_before, own_after, list(asked.values()))):
                verdicts[n] = verdict
        return verdicts

    def _edit(
        self, item: Item, before: Image.Image, after: Image.Image, verdict: Verdict | None
    ) -> MeasuredEdit:
        size = self.settings.size
        target = item.target
        if self.settings.reconstruct:
            mask, target = np.zeros(size[::-1], dtype=bool), item.source
        elif self.settings.references == "generated":
            # Only a judge knows where the subjects of generated references are.
            mask = verdict.mask if verdict else None
        else:
            mask = np.asarray(item.mask(*size))
        return MeasuredEdit(before, after, mask, item.source, target)
