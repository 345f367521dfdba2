"""Defines a judge: something that says whether an edit shows what was asked for.

The library only asks a judge. `training.judge` has one for flux-nano's scenes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Verdict:
    """A judge's verdict on one edit.

    Attributes:
        success: Whether the edit shows everything that was asked for.
        overlap: Intersection over union of the subjects before and after, in 0..1.
        mask: What the edit may have changed, booleans `H W`, for benchmarks that have no mask.
    """

    success: bool
    overlap: float
    mask: np.ndarray


class Judge(Protocol):
    """Says whether edits show what was asked for."""

    def judge(
        self,
        before: Sequence[Image.Image],
        after: Sequence[Image.Image],
        asked: Sequence[Mapping[str, Any]],
    ) -> list[Verdict]:
        """Judge each edit by the image before it, the edit itself, and what was asked for (`Item.asked`)."""
        ...
