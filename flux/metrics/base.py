"""How alike two pictures are, by several measures, each loaded only when asked for."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image


class Metric:
    """How alike pictures are to their references."""

    @classmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Metric":
        """The metric, ready for work; `source` is the hub id or folder of its net, None the usual one.

        Raises:
            InputError: a package or weights that are not there.
        """
        return cls()

    def of(self, references: Sequence[Image], pictures: Sequence[Image]) -> list[float]:
        """The similarity of each picture to the reference at its place, of the same size; more is more
        alike.
        """
        raise NotImplementedError

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        """Similarities -> how much each picture changed: 0 if not at all, more if less alike."""
        return 1 - values
