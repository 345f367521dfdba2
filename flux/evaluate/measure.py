"""What is measured of each edit."""

from collections.abc import Sequence

import numpy as np
import torch

from flux.errors import InputError
from flux.evaluate.benchmark import Item
from flux.evaluate.methods import Made
from flux.evaluate.settings import EvaluateSettings
from flux.evaluate.store import Row
from flux.metrics.edits import Edit, EditMetrics
from flux.runtime.devices import pick_device
from flux.specs import encoder_of


class Measurer:
    """What is known of an edit once it is made.

    Raises:
        InputError: as `EditMetrics.load`, or a judge that is not there.
    """

    def __init__(self, settings: EvaluateSettings):
        device = pick_device(settings.device)
        encoder = encoder_of(settings.encoder or settings.model)
        self.metrics = EditMetrics.load(settings.metrics, encoder, settings.clip, device)
        self.judge, self.settings = _load_judge(settings.judge, device), settings
        # Where the next edits are made meanwhile, each look at a number would wait for these.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def rows(self, method: str, items: Sequence[Item], made: Sequence[Made]) -> list[Row]:
        """The rows of results.csv for some items that one method edited."""
        with torch.cuda.stream(self.stream):
            return self._rows(method, items, made)

    def _rows(self, method: str, items: Sequence[Item], made: Sequence[Made]) -> list[Row]:
        size = self.settings.width, self.settings.height
        befores = [m.reference or item.photo(*size) for item, m in zip(items, made)]
        afters = [m.picture for m in made]
        generated = self.settings.references == "generated"
        judged, verdicts = [n for n, item in enumerate(items) if self.judge and item.asked], {}
        if judged:
            sides = ([pictures[n] for n in judged] for pictures in (befores, afters))
            verdicts = dict(zip(judged, self.judge.of(*sides, [items[n].asked for n in judged])))
        edits = []
        for n, (item, before, after) in enumerate(zip(items, befores, afters)):
            if self.settings.reconstruct:
                mask, target = np.zeros(size[::-1], dtype=bool), item.source
            elif generated:
                # Only a judge knows where its subjects are.
                mask, target = verdicts[n].mask if n in verdicts else None, item.target
            else:
                mask, target = np.asarray(item.mask(*size)), item.target
            edits.append(Edit(before, after, mask, item.source, target))
        rows = []
        for n, (item, m, scores) in enumerate(zip(items, made, self.metrics.of(edits))):
            row: Row = {"item": item.key, "kind": item.kind, "method": method, **scores}
            if n in verdicts:
                row |= {"success": float(verdicts[n].success), "overlap": verdicts[n].overlap}
            rows.append(row | {"seconds": m.seconds, "evaluations": m.evaluations})
        return rows


def _load_judge(path: str | None, device):
    if path is None:
        return None
    try:
        from training.judge import Judge
    except ImportError as error:
        raise InputError(
            f"Got the judge {path}, which takes the folder training/ of the repository: start there, or "
            "leave judge out"
        ) from error
    return Judge.load(path, device)
