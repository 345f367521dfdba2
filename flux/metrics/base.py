"""The interface of metrics that compare two images."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL.Image import Image


class Metric(ABC):
    """A measure of how similar images are to their references."""

    @classmethod
    @abstractmethod
    def load(cls, source: str | None = None, device: str | torch.device = "cpu") -> "Metric":
        """Loads the metric.

        Args:
            source: hub id or folder of its model. If None, the usual one.
            device: where the model computes.

        Raises:
            InputError: a package or the model's weights are missing.
        """

    @abstractmethod
    def compare(self, references: Sequence[Image], images: Sequence[Image]) -> list[float]:
        """Returns each image's similarity to the reference at its place; more is more similar.

        Args:
            references: one for each image, of the same size.
            images: the images to compare.
        """

    @staticmethod
    def change(values: np.ndarray) -> np.ndarray:
        """Converts similarities to changes: 0 for an equal image, larger for a less similar one."""
        return 1 - values
